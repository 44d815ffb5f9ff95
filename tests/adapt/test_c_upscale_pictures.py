"""C-Upscale on the built-in image models: no other library is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt.c_upscale_hosts import denoiser_of
from glocal.adapt.c_upscale_pictures import PictureDenoiser
from glocal.adapt.c_upscale_run import upscale
from glocal.data.captions import LENGTH, WORDS
from glocal.models.generation import (
    ImageDiT,
    ImageDiTConfig,
    ImageUNet,
    ImageUNetConfig,
    Painter,
    PictureModel,
    SampleSpec,
    sample_pictures,
    to_latents,
)
from glocal.models.generation.sampler import noise_levels

CAPTION = "a plain red disc at the top left"
FEW: dict[str, Any] = {"steps": 4, "strength": 0.5, "guidance": 2.0, "output_type": "latent"}
PLAIN: dict[str, Any] = {"structure": 0.0, "rap": "off", "mix": (0.0, 0.0)}


@pytest.fixture(params=["unet", "dit"])
def model(request: pytest.FixtureRequest) -> PictureModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = ImageDiTConfig(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32)
        unet = request.param == "unet"
        net = ImageUNet(ImageUNetConfig(block_out_channels=(8, 8, 16))) if unet else ImageDiT(sizes)
        made = PictureModel(net, WORDS, LENGTH).eval()
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        return made


@pytest.fixture
def picture(generator: torch.Generator) -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=generator)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_without_priors_at_the_same_size_it_is_the_sampler_from_a_noised_picture(
    model: PictureModel, picture: Tensor
) -> None:
    found = upscale(model, picture, 64, 64, CAPTION, generator=seeded(), **FEW, **PLAIN)
    spec = SampleSpec(steps=4, shift=3.0, guidance=2.0)
    level = noise_levels(spec)[2]
    noise = torch.randn(1, 12, 32, 32, generator=seeded())
    start = (1 - level) * to_latents(picture) + level * noise
    wanted = sample_pictures(model, start, model.tokens(CAPTION), spec, start=2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_it_enlarges_and_leaves_the_model_as_it_was(model: PictureModel, picture: Tensor) -> None:
    before = upscale(model, picture, 64, 64, CAPTION, generator=seeded(), **FEW, **PLAIN)
    found = upscale(Painter(model), picture, 128, 96, CAPTION, generator=seeded(), **{**FEW, "output_type": "pt"})
    assert found.shape == (1, 3, 128, 96) and bool(((found >= 0) & (found <= 1)).all())
    assert torch.equal(upscale(model, picture, 64, 64, CAPTION, generator=seeded(), **FEW, **PLAIN), before)


@pytest.mark.parametrize("changed", [{"rap": "off"}, {"rap": "gate"}, {"structure": 0.0}])
def test_every_prior_counts(changed: dict[str, Any], model: PictureModel, picture: Tensor) -> None:
    given = {**FEW, "structure_share": 1.0}  # in the first step the small picture and the large one agree
    plain = upscale(model, picture, 96, 96, CAPTION, generator=seeded(), **given)
    assert not torch.allclose(
        upscale(model, picture, 96, 96, CAPTION, generator=seeded(), **{**given, **changed}), plain
    )


def test_regions_have_captions_of_their_own(model: PictureModel, picture: Tensor) -> None:
    seen: list[tuple[int, ...]] = []

    def prompter(region: Tensor, caption: str) -> str:
        seen.append(tuple(region.shape))
        return caption if len(seen) % 2 else "a blue square"

    found = upscale(model, picture, 64, 96, CAPTION, prompter=prompter, generator=seeded(), **FEW)
    assert seen == [(3, 64, 64)] * 2
    assert not torch.allclose(found, upscale(model, picture, 64, 96, CAPTION, generator=seeded(), **FEW))


def test_padding_and_commas_are_no_content(model: PictureModel) -> None:
    denoiser = denoiser_of(model)
    assert isinstance(denoiser, PictureDenoiser)
    content = denoiser.words([CAPTION]).content
    assert content is not None and content.sum() == 5 and content[0, :5].all()


def test_refusals(model: PictureModel, picture: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"height, width=\(66, 64\) pixels; legal: multiples of 4, nearest: \(64, 64\)"
    ):
        upscale(model, picture, 66, 64, CAPTION)
    with pytest.raises(ValueError, match="word 'heron' is unknown"):
        upscale(model, picture, 64, 64, "a red heron")
