"""UltraGen in tiny Wan models and in the built-in video model: attach, train, save, take out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import scale_dit, ultragen
from glocal.adapt.ultragen import UltraGen, UltraGenParts, UltraGenSettings
from glocal.models.generation import ImageDiT, ImageDiTConfig
from glocal.models.generation.video_dit import VideoDiT

from .hosts.exam import Inputs, run
from .hosts.sizes import WAN as SIZES
from .test_pipelines import generate, wan
from .test_sparse_methods import FLUX, WAN, made

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

SMALL = UltraGenSettings(windows=2, global_stride=2, rank=3)
FULL = UltraGenSettings(windows=1, cross_window="fixed", hierarchical=False, global_stride=1, rank=3, ffn_lora=True)


def shaken(parts: UltraGenParts) -> None:
    """No parameter is zero or special."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in parts.parameters():
            nn.init.normal_(parameter, std=0.2)


def parts_of(handle: Any) -> UltraGenParts:
    assert isinstance(handle.method, UltraGen)
    return handle.method.parts


@pytest.mark.parametrize("changed", [{}, {"global_branch": False}])
def test_one_window_with_fresh_parts_is_wan(changed: dict[str, Any], generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    before = run(model, given)
    with ultragen(model, settings=FULL, **changed):
        torch.testing.assert_close(run(model, given), before, rtol=0, atol=1e-5)
    with ultragen(model, settings=SMALL):
        assert not torch.allclose(run(model, given), before, atol=1e-4)
    assert torch.equal(run(model, given), before)
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())


def test_fused_projections_are_the_same(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    handle = ultragen(model, settings=SMALL)
    shaken(parts_of(handle))
    apart = run(model, given)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn1.fuse_projections()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(run(model, given), apart, rtol=0, atol=1e-5)


def test_one_window_with_fresh_parts_is_the_built_in_model(model: VideoDiT, clip: Tensor) -> None:
    sigma = torch.tensor([0.6])
    before = model(clip, sigma)
    with ultragen(model, settings=FULL):
        torch.testing.assert_close(model(clip, sigma), before, rtol=0, atol=1e-5)
    with ultragen(model, settings=SMALL):
        assert not torch.allclose(model(clip, sigma), before, atol=1e-4)
    assert torch.equal(model(clip, sigma), before)


def test_the_built_in_image_model_takes_it_too(generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ImageDiT(ImageDiTConfig(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
    latents, words = torch.randn(2, 12, 1, 18, 12, generator=generator), torch.randn(2, 5, 64, generator=generator)
    given = (latents, torch.tensor([900.0, 300.0]), words)
    before = net(*given)[0]
    with ultragen(net, settings=FULL):
        torch.testing.assert_close(net(*given)[0], before, rtol=0, atol=1e-4)
    with ultragen(net, settings=SMALL, ffn_lora=True) as handle:
        shaken(parts_of(handle))
        found = net(*given)[0]
        assert not torch.allclose(found, before, atol=1e-3)
        found.square().mean().backward()
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in parts_of(handle).parameters())
    assert torch.equal(net(*given)[0], before)


def test_every_row_has_its_noise_level(model: VideoDiT, clip: Tensor) -> None:
    both, sigma = torch.cat([clip, clip.flip(1)]), torch.tensor([0.9, 0.2])
    with ultragen(model, settings=SMALL) as handle:
        shaken(parts_of(handle))
        found = model(both, sigma)
        for row in range(2):
            alone = model(both[row : row + 1], sigma[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_parts_learn_and_the_model_stays(model: VideoDiT, clip: Tensor) -> None:
    model.requires_grad_(False)
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    with ultragen(model, settings=SMALL, ffn_lora=True, conv="depthwise") as handle:
        parts = parts_of(handle)
        shaken(parts)
        optimizer = torch.optim.Adam(parts.parameters(), 0.01)
        losses = []
        for _ in range(8):
            loss = (model(clip, torch.tensor([0.5])) - clip).square().mean()
            optimizer.zero_grad()
            loss.backward()
            losses.append(float(loss.detach()))
            assert all(p.grad is not None and bool((p.grad != 0).any()) for p in parts.parameters())
            optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())


def test_gradient_checkpointing_gives_the_same_gradients(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    handle = ultragen(model, settings=SMALL)
    parts = parts_of(handle)
    shaken(parts)
    found = []
    for on in (False, True):
        if on:
            model.train().enable_gradient_checkpointing()  # type: ignore[operator]
        parts.zero_grad()
        model(**given, return_dict=False)[0].square().mean().backward()
        found.append([p.grad.clone() for p in parts.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_parts_are_saved_and_loaded(tmp_path: Path, generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    handle = ultragen(model, settings=SMALL, ffn_lora=True)
    parts = parts_of(handle)
    shaken(parts)
    found = run(model, given)
    parts.save(tmp_path / "parts.safetensors")
    handle.undo()
    names = parts.state_dict()
    assert {f"blocks.0.attn1.{n}" for n in (
        "global.down.weight", "global.up.weight", "global.up.bias", "global.lora_q.A", "global.lora_v.B",
        "hier.lora_k.A", "gate_global.mlp.0.weight", "gate_hier.mlp.2.bias",
    )} <= set(names)  # fmt: skip
    assert {"blocks.1.ffn.lora_in.A", "blocks.1.ffn.lora_out.B"} <= set(names)
    assert not any(name.endswith((".a", ".b")) for name in names)
    with ultragen(model, parts=tmp_path / "parts.safetensors") as handle:
        assert parts_of(handle).settings == parts.settings
        assert torch.equal(run(model, given), found)
    with pytest.raises(FileNotFoundError):
        ultragen(model, parts=tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"has format None; legal: 'glocal.ultragen/1'"):
        ultragen(model, parts=tmp_path / "odd.safetensors")


def test_a_pipeline_runs_and_is_given_back() -> None:
    pipe = wan(boundary_ratio=0.8)
    plain = generate(pipe)
    with ultragen(pipe, settings=SMALL) as handle:
        assert "transformer_2.blocks.0.attn1.global.down.weight" in parts_of(handle).state_dict()
        out = generate(pipe)
        assert torch.equal(generate(pipe), out)
        shaken(parts_of(handle))
        assert not torch.equal(generate(pipe), out)
    assert not torch.equal(out, plain)
    assert torch.equal(generate(pipe), plain)


def test_one_window_in_a_pipeline_is_the_pipeline() -> None:
    pipe = wan()
    pipe.transformer_2 = None
    plain = generate(pipe)
    with ultragen(pipe, settings=FULL) as handle:
        assert "blocks.0.attn1.global.down.weight" in parts_of(handle).state_dict()
        torch.testing.assert_close(generate(pipe), plain, rtol=0, atol=1e-4)
    assert torch.equal(generate(pipe), plain)


def test_levels_of_tokens_reach_the_gate(generator: torch.Generator) -> None:
    model, given = made(WAN, generator, batch=1)
    handle = ultragen(model, settings=SMALL)
    shaken(parts_of(handle))
    tokens = given["hidden_states"][0, 0].numel() // 4
    levels: Inputs = {**given, "timestep": given["timestep"][:, None].expand(1, tokens).contiguous()}
    torch.testing.assert_close(run(model, levels), run(model, given), rtol=0, atol=1e-5)


def test_the_published_defaults() -> None:
    settings = UltraGenSettings()
    assert (settings.windows, settings.global_stride, settings.coarse_stride, settings.rank) == (4, 4, 2, 64)
    assert settings.cross_window == "alternating" and settings.global_branch and settings.hierarchical


def test_refusals(generator: torch.Generator, tmp_path: Path) -> None:
    flux, _ = made(FLUX, generator)
    with pytest.raises(
        ValueError, match="FluxTransformer2DModel is no model it knows; legal: WanTransformer3DModel, VideoDiT"
    ):
        ultragen(flux)
    model, _ = made(WAN, generator)
    with pytest.raises(ValueError, match="windws=3 is unknown; legal: windows, cross_window"):
        ultragen(model, windws=3)
    with pytest.raises(ValueError, match=r"preset='wan' is unknown; legal: wan2.1-1.3b"):
        ultragen(model, "wan")
    with pytest.raises(ValueError, match="parts bring their settings; legal: parts alone"):
        ultragen(model, parts=UltraGenParts(model, SMALL), windows=2)
    other, _ = made(WAN, generator)
    UltraGenParts(other, SMALL).save(tmp_path / "parts.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        deeper = diffusers.WanTransformer3DModel(**{**SIZES, "num_layers": 3})
        ultragen(deeper, parts=tmp_path / "parts.safetensors")
    with pytest.raises(ValueError, match="WanTransformer3DModel is not built; legal: FluxTransformer2DModel"):
        scale_dit(model)
    with ultragen(model, settings=SMALL), pytest.raises(ValueError, match="an attention mask arrives"):
        x = torch.zeros(1, 72, 24)
        model.get_submodule("blocks.0.attn1")(x, attention_mask=torch.ones(1))
