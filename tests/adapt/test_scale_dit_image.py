"""Scale-DiT in the built-in image model."""

from __future__ import annotations

import pytest
import torch

from glocal.adapt.scale_dit import PRESETS, scale_dit
from glocal.adapt.scale_dit_image_blocks import TUNED, tunable
from glocal.models.generation import ImageDiT, ImageDiTConfig
from glocal.nn.lora import LowRank, PartLora

SIZES = ImageDiTConfig(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32, text_dim=16)


@pytest.fixture
def model() -> ImageDiT:
    torch.manual_seed(0)
    net = ImageDiT(SIZES).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return net


def given(rows: int = 16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 12, 1, rows, 16, generator=g),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=g),
    }


LOW = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_without_a_small_picture_the_model_is_untouched(model: ImageDiT) -> None:
    plain = model(**given())[0]
    with scale_dit(model) as handle:
        assert torch.equal(model(**given())[0], plain)
        handle.method.give(LOW)  # type: ignore[attr-defined]
        guided = model(**given())[0]
        assert guided.shape == plain.shape and not torch.allclose(guided, plain, atol=1e-3)
        handle.method.give(None)  # type: ignore[attr-defined]
        assert torch.equal(model(**given())[0], plain)
    assert torch.equal(model(**given())[0], plain)


@torch.no_grad()
def test_low_tokens_nobody_sees_leave_dense_attention(model: ImageDiT) -> None:
    """A window over the whole picture and no guidance: the model itself, whatever the small picture is."""
    plain = model(**given())[0]
    with scale_dit(model, window=(32, 32), guided=False) as handle:
        handle.method.give(LOW)  # type: ignore[attr-defined]
        torch.testing.assert_close(model(**given())[0], plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_low_tokens_are_the_picture_at_level_0(model: ImageDiT) -> None:
    """Low tokens see only themselves and words: their stream is that of the small picture alone at noise level 0."""
    seen = []
    with scale_dit(model, scale_positions=False) as handle:
        handle.method.give(LOW.expand(2, -1, -1, -1))  # type: ignore[attr-defined]
        hook = model.norm_out.register_forward_pre_hook(lambda *_: seen.append(handle.method._now.low))  # type: ignore[attr-defined]
        model(**given())
        hook.remove()
    streams = []
    hook = model.norm_out.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    model(LOW[:, :, None].expand(2, -1, -1, -1, -1), torch.zeros(2), given()["encoder_hidden_states"])
    hook.remove()
    torch.testing.assert_close(seen[0], streams[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_positions_of_low_tokens_are_scaled(model: ImageDiT) -> None:
    out = []
    for scaled in (True, False):
        with scale_dit(model, scale_positions=scaled) as handle:
            handle.method.give(LOW)  # type: ignore[attr-defined]
            out.append(model(**given())[0])
    assert not torch.allclose(*out, atol=1e-3)


def test_updates_are_trained_and_come_back(model: ImageDiT) -> None:
    model.requires_grad_(False)
    paths = [f"blocks.{n}.{name}" for n in range(2) for name in TUNED]
    lora = PartLora({path: LowRank.fresh(model.get_submodule(path), 2) for path in paths})  # type: ignore[arg-type]
    with scale_dit(model, lora=lora, backend="reference") as handle:
        handle.method.give(LOW)  # type: ignore[attr-defined]
        before = model(**given())[0]
        before.square().mean().backward()
        assert all(u.b.grad is not None and u.b.grad.any() for _, u in list(lora.items())[:5])
        with torch.no_grad():
            for _, update in lora.items():
                update.b.normal_(std=0.1)
            after = model(**given())[0]
    assert not torch.allclose(before, after, atol=1e-3)
    with scale_dit(model, lora=lora.write()) as handle, torch.no_grad():
        handle.method.give(LOW)  # type: ignore[attr-defined]
        torch.testing.assert_close(model(**given())[0], after, rtol=0, atol=1e-5)


def test_refusals(model: ImageDiT) -> None:
    assert PRESETS["demo-image"].fits(model)
    assert tunable("blocks.1.ffn.net.2") and not tunable("blocks.1.attn2.to_q")
    with scale_dit(model) as handle:
        give = handle.method.give  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"latents of shape \(1, 12, 8, 8\) with size=\(8, 8\); legal"):
            give(LOW, (8, 8))
        give(LOW.expand(3, -1, -1, -1))
        with pytest.raises(ValueError, match="3 small images for a batch of 2; legal: 1 or as many"):
            model(**given())
        give(LOW)
        with pytest.raises(ValueError, match="6 x 8 tokens under a small image of 4 x 4; legal: the same whole factor"):
            model(**given(12))
    wrong = {"transformer.blocks.0.attn2.to_q.lora_A.weight": torch.zeros(1, 24)}
    with pytest.raises(ValueError, match="lora_A alone"):
        scale_dit(model, lora=wrong)
