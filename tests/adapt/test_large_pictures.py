"""C-Upscale and UltraGen on the built-in image models."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from glocal.adapt.c_upscale_pictures import PictureDenoiser
from glocal.adapt.c_upscale_run import upscale
from glocal.adapt.ultragen import ultragen
from glocal.models.generation import (
    ImageDiT,
    ImageDiTConfig,
    ImageUNet,
    ImageUNetConfig,
    PictureModel,
    SampleSpec,
    sample_pictures,
    to_latents,
)
from glocal.models.generation.sampler import noise_levels

WORDS = ("", ",", "red", "blue", "disc")


def made(kind: str) -> PictureModel:
    torch.manual_seed(0)
    sizes = ImageDiTConfig(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32)
    net = ImageUNet(ImageUNetConfig(block_out_channels=(8, 8, 16))) if kind == "unet" else ImageDiT(sizes)
    model = PictureModel(net, WORDS, 6).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_one_region_without_priors_is_the_sampler(kind: str) -> None:
    model = made(kind)
    denoiser = PictureDenoiser(model)
    denoiser.window = (16, 16)  # the whole picture
    picture = torch.rand(2, 3, 16, 16)
    found = upscale(
        denoiser, picture, 32, 32, denoiser.words(["red disc", "a blue disc"]), steps=4, strength=0.5, guidance=2.0,
        structure=0.0, rap="off", generator=torch.Generator().manual_seed(3), output_type="latent",
    )  # fmt: skip
    spec = SampleSpec(4, denoiser.shift, 2.0)
    noise = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(3))
    clean = to_latents(interpolate(picture, (32, 32), mode="bicubic").clamp(0, 1))
    level = noise_levels(spec)[2]
    tokens = model.tokens("red disc", "a blue disc")
    wanted = sample_pictures(model, (1 - level) * clean + level * noise, tokens, spec, start=2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_priors_act_and_leave_the_model(kind: str) -> None:
    model = made(kind)
    denoiser = PictureDenoiser(model)
    denoiser.window = (8, 8)
    picture = torch.rand(1, 3, 16, 16)
    before = sample_pictures(model, torch.ones(1, 12, 8, 8), model.tokens("red disc"), SampleSpec(2))
    out = [
        upscale(denoiser, picture, 32, 32, "red disc", steps=8, guidance=2.0, rap=rap, structure=structure)
        for rap, structure in (("replace", 1.0), ("replace", 0.0), ("off", 0.0))
    ]
    assert out[0].shape == (1, 3, 32, 32) and bool(torch.isfinite(out[0]).all())
    assert not torch.allclose(out[0], out[1], atol=1e-3) and not torch.allclose(out[1], out[2], atol=1e-3)
    after = sample_pictures(model, torch.ones(1, 12, 8, 8), model.tokens("red disc"), SampleSpec(2))
    assert torch.equal(before, after)


def test_latents_and_words_of_the_denoiser() -> None:
    denoiser = PictureDenoiser(made("dit"))
    picture = torch.rand(1, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(denoiser.decode(denoiser.encode(picture, None)), picture)
    words = denoiser.words(["red disc", ""])
    assert words.content is not None and words.content.sum(1).tolist() == [2, 0]
    assert denoiser.levels(4, 2)[-1][1] == 0.0 and len(denoiser.levels(4, 2)) == 2


@torch.no_grad()
def test_ultragen_in_the_image_model() -> None:
    net = made("dit").net
    given = (torch.randn(1, 12, 1, 32, 32), torch.tensor([700.0]), torch.randn(1, 6, 64))
    plain = net(*given)[0]
    with ultragen(net, windows=1, cross_window="fixed", global_branch=False, hierarchical=False):
        torch.testing.assert_close(net(*given)[0], plain, rtol=0, atol=1e-5)  # one window is the model itself
    with ultragen(net, rank=4, conv="depthwise"):
        changed = net(*given)[0]
    assert changed.shape == plain.shape and not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(net(*given)[0], plain)
