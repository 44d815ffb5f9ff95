"""The built-in image models: sizes, agreement with diffusers' classes, sampling, weights, methods attached to them."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from glocal.adapt import attach, hidiffusion
from glocal.adapt.attach import sites_of
from glocal.adapt.freeswim import FreeSwim, freeswim
from glocal.adapt.hidiffusion_schedule import PRESETS, recognised
from glocal.adapt.tile_windows import tile_windows
from glocal.data.captions import LENGTH, WORDS
from glocal.models.generation import (
    PICTURE_SPEC,
    ImageDiT,
    ImageDiTConfig,
    ImageUNet,
    ImageUNetConfig,
    Painter,
    PictureModel,
    SampleSpec,
    draw_picture_noise,
    load_picture_model,
    sample_pictures,
    save_picture_model,
    to_latents,
    to_pictures,
)
from glocal.models.generation.picture_weights import shipped

SPEC = SampleSpec(steps=3, shift=3.0, guidance=2.0)


def made(kind: str, seed: int = 0) -> PictureModel:
    """A small model whose every parameter counts."""
    torch.manual_seed(seed)
    sizes = ImageDiTConfig(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32)
    net = ImageUNet(ImageUNetConfig(block_out_channels=(8, 8, 16))) if kind == "unet" else ImageDiT(sizes)
    model = PictureModel(net, WORDS, LENGTH).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def drawn(model: PictureModel, side: int = 32, spec: SampleSpec = SPEC) -> torch.Tensor:
    tokens = model.tokens(*["a plain red disc at the top left, on a night background"] * 2)
    return sample_pictures(model, draw_picture_noise([0, 1], side, side), tokens, spec)


@pytest.mark.parametrize("size", [(8, 12), (5, 9), (16, 16)])
def test_unet_is_diffusers_unet(size: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    net = made("unet").net
    assert isinstance(net, ImageUNet)
    stages = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    other = diffusers.UNet2DConditionModel(
        down_block_types=stages,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        **asdict(net.config),
    )
    other.load_state_dict(net.state_dict(), strict=True)
    x, words = torch.randn(2, 12, *size), torch.randn(2, LENGTH, net.config.cross_attention_dim)
    level = torch.tensor([990.0, 3.0])
    torch.testing.assert_close(net(x, level, words)[0], other(x, level, words).sample, rtol=0, atol=1e-5)


def test_dit_is_diffusers_wan() -> None:
    diffusers = pytest.importorskip("diffusers")
    net = made("dit").net
    assert isinstance(net, ImageDiT)
    other = diffusers.WanTransformer3DModel(**asdict(net.config))
    other.load_state_dict(net.state_dict(), strict=True)
    x, words, level = torch.randn(2, 12, 2, 8, 6), torch.randn(2, LENGTH, 64), torch.tensor([990.0, 3.0])
    torch.testing.assert_close(net(x, level, words)[0], other(x, level, words).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_weights_come_back(kind: str, tmp_path) -> None:
    model = made(kind)
    save_picture_model(model, tmp_path / "w.safetensors", {"steps": "3"})
    back = load_picture_model(tmp_path / "w.safetensors")
    assert type(back.net) is type(model.net) and back.net.config == model.net.config
    assert back.vocabulary == tuple(WORDS) and back.length == LENGTH
    for name, value in back.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].half().float())
    with pytest.raises(FileNotFoundError, match="train them with bench/train_image.py"):
        load_picture_model(tmp_path / "no.safetensors")


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_sampling_follows_seed_caption_and_size(kind: str) -> None:
    model = made(kind)
    a = drawn(model)
    assert a.shape == (2, 12, 16, 16)
    assert torch.equal(a, drawn(model)) and not torch.equal(a[0], a[1])
    one = sample_pictures(model, draw_picture_noise([1], 32, 32), model.tokens("a blue ring"), SPEC)
    assert not torch.allclose(one[0], a[1], atol=1e-3)
    assert drawn(model, 48).shape == (2, 12, 24, 24)
    seen = []
    half = sample_pictures(
        model,
        draw_picture_noise([0], 32, 32),
        model.tokens("a blue ring"),
        SPEC,
        callback=lambda s: seen.append(s.latent),
    )
    again = sample_pictures(model, seen[0], model.tokens("a blue ring"), SPEC, start=1)
    assert torch.equal(again, half) and len(seen) == 3


def test_latents_lose_nothing() -> None:
    pictures = torch.rand(2, 3, 8, 12)
    assert to_latents(pictures).shape == (2, 12, 4, 6)
    torch.testing.assert_close(to_pictures(to_latents(pictures)), pictures)


def test_wrong_sizes_are_named() -> None:
    model = made("dit")
    with pytest.raises(ValueError, match="30 x 32 px; legal: multiples of 4"):
        draw_picture_noise([0], 30, 32)
    with pytest.raises(ValueError, match="2 captions for 1 latents; legal: one each"):
        sample_pictures(model, draw_picture_noise([0], 32, 32), model.tokens("a ring", "a ring"))
    with pytest.raises(ValueError, match=r"start=3: must be a step in 0\.\.2"):
        sample_pictures(model, draw_picture_noise([0], 32, 32), model.tokens("a ring"), SPEC, start=3)
    with pytest.raises(ValueError, match="multiples of the patch"):
        model.net(torch.zeros(1, 12, 1, 5, 4), torch.ones(1), torch.zeros(1, LENGTH, 64))
    unet = made("unet").net
    with pytest.raises(ValueError, match="encoder_attention_mask is given; legal: None"):
        unet(torch.zeros(1, 12, 4, 4), torch.ones(1), torch.zeros(1, LENGTH, 64), torch.ones(1, LENGTH))


def test_hosts_know_them() -> None:
    unet, dit = made("unet").net, made("dit").net
    kinds = [s.kind for s in sites_of(unet)]
    assert len(kinds) == 14 and kinds.count("self") == 7
    assert [s.name for s in sites_of(dit)] == ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]
    assert recognised(unet) == "demo-image" and PRESETS["demo-image"].fits(unet)


def test_hidiffusion_changes_large_pictures_and_goes_again() -> None:
    model = made("unet")
    plain = drawn(model, 128)
    with hidiffusion(model.net, steps=3) as handle:
        changed = drawn(model, 128)
        assert handle.state.step == 2
    assert changed.shape == plain.shape and not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(drawn(model, 128), plain)


def test_freeswim_and_tile_windows_attach_to_the_dit() -> None:
    model = made("dit")
    plain = drawn(model, 128)
    windows = lambda: tile_windows(model.net, tile=(1, 4, 4), window=(1, 3, 3))  # noqa: E731
    for put in (lambda: freeswim(model.net, scale_tokens=None), windows):
        with put():
            changed = drawn(model, 128)
        assert not torch.allclose(changed, plain, atol=1e-4)
        assert torch.equal(drawn(model, 128), plain)
    with freeswim(model.net, scale_tokens=None) as handle:  # a window that holds the whole picture is the model itself
        assert isinstance(handle.method, FreeSwim)
        torch.testing.assert_close(drawn(model, 32), drawn(made("dit"), 32), rtol=0, atol=1e-4)


def test_guidance_is_seen_by_methods() -> None:
    from glocal.adapt.attach import Method

    seen = []

    class Watch(Method):
        def core(self, q, k, v, call, inner):
            seen.append((call.state.step, call.state.branch))
            return inner(q, k, v, call)

    model = made("dit")
    with attach(model.net, Watch()):
        drawn(model)
    assert seen[::2] == [(s, b) for s in range(3) for b in ("cond", "uncond")]


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_shipped_models_draw_what_the_caption_says(kind: str) -> None:
    from glocal.data.objects import COLOURS
    from glocal.measure import find_objects

    if not shipped(kind).is_file():  # type: ignore[arg-type]
        pytest.skip("the trained image models are not shipped here")
    model = load_picture_model(kind)  # type: ignore[arg-type]
    colours = ["red", "green", "blue", "yellow"]
    tokens = model.tokens(*[f"a plain {c} disc at the middle centre, on a mist background" for c in colours])
    pictures = to_pictures(sample_pictures(model, draw_picture_noise(range(4)), tokens, PICTURE_SPEC))
    found = find_objects(pictures, torch.tensor(list(COLOURS.values())))
    names = list(COLOURS)
    right = [len(f) == 1 and names[f[0].colour] == c and abs(f[0].x - 0.5) < 0.25 for f, c in zip(found, colours)]
    assert sum(right) >= 3


def test_painter_takes_words_and_pixels() -> None:
    painter = Painter(made("dit"))
    one = painter.generate(seed=1, steps=2, caption="a red disc", size="32")
    assert one.shape == (1, 3, 32, 32) and torch.equal(
        one, painter.generate(seed=1, steps=2, caption="red disc", size=32)
    )
    assert not torch.equal(one, painter.generate(seed=1, steps=2, caption="blue disc", size=32))
    assert painter.model is painter.pictures.net
    with pytest.raises(ValueError, match=r"size='x' pixels; legal: a multiple of 4; the model was trained on 64"):
        painter.generate(size="x")
    with pytest.raises(ValueError, match=r"word 'dog' is unknown; .*nearest:"):
        painter.generate(caption="a dog")
