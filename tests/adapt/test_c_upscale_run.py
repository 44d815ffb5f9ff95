"""The whole of C-Upscale on tiny pipelines: what it is without its priors, and what each of them does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glocal.adapt import open_handles
from glocal.adapt.c_upscale import CUpscaleSettings
from glocal.adapt.c_upscale_hosts import Words, denoiser_of
from glocal.adapt.c_upscale_run import upscale
from glocal.ops.frequency import low_pass

from .hosts.sizes import PIXART, SD15, SDXL

REASON = "is not installed: pip install 'glocal[diffusers,transformers]'"
diffusers = pytest.importorskip("diffusers", reason=f"diffusers {REASON}")
pytest.importorskip("transformers", reason=f"transformers, without which diffusers has no pipelines, {REASON}")

PLAIN: dict[str, Any] = {"structure": 0.0, "rap": "off", "mix": (0.0, 0.0)}
FEW: dict[str, Any] = {"steps": 5, "strength": 0.7, "guidance": 3.0}


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()


def pipeline(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        common = {"vae": vae(), "text_encoder": None, "tokenizer": None}
        if kind == "sd15":
            pipe = diffusers.StableDiffusionPipeline(
                **common,
                unet=diffusers.UNet2DConditionModel(**SD15).eval(),
                scheduler=diffusers.DDIMScheduler(clip_sample=False),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        elif kind == "sdxl":
            pipe = diffusers.StableDiffusionXLPipeline(
                **common,
                text_encoder_2=None,
                tokenizer_2=None,
                unet=diffusers.UNet2DConditionModel(**SDXL).eval(),
                scheduler=diffusers.EulerDiscreteScheduler(),
                add_watermarker=False,
            )
        else:
            pipe = diffusers.PixArtAlphaPipeline(
                **common,
                transformer=diffusers.PixArtTransformer2DModel(**PIXART).eval(),
                scheduler=diffusers.DPMSolverMultistepScheduler(),
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(seed: int, kind: str = "sdxl") -> Words:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, 7, 32, generator=generator)
    mask = None
    if kind == "pixart":
        mask = torch.ones(1, 7)
        mask[:, 6:] = 0
    return Words(embeds, mask, torch.randn(1, 24, generator=generator) if kind == "sdxl" else None)


@pytest.fixture
def picture(generator: torch.Generator) -> Tensor:
    """[1, 3, 32, 32]: 16 x 16 latents, what the tiny models were made for."""
    return torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), (32, 32), mode="bicubic").clamp(
        0, 1
    )


def large(pipe: Any, picture: Any, kind: str = "sdxl", size: tuple[int, int] = (64, 64), **more: Any) -> Tensor:
    given: dict[str, Any] = {"prompt": text(1, kind), "negative": text(2, kind), "output_type": "latent", **FEW, **more}
    return upscale(pipe, picture, *size, generator=torch.Generator().manual_seed(3), **given)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_without_priors_at_the_same_size_it_is_image_to_image(kind: str, picture: Tensor) -> None:
    pipe, words, silent = pipeline(kind), text(1), text(2)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    given: dict[str, Any] = {"prompt_embeds": words.embeds, "negative_prompt_embeds": silent.embeds}
    if kind == "sdxl":
        other = diffusers.StableDiffusionXLImg2ImgPipeline(
            **{n: getattr(pipe, n) for n in (*names, "text_encoder_2", "tokenizer_2")}, add_watermarker=False
        )
        # The method gives both rows the words' own pooled embeddings.
        given |= {"pooled_prompt_embeds": words.pooled, "negative_pooled_prompt_embeds": silent.pooled}
    else:
        other = diffusers.StableDiffusionImg2ImgPipeline(
            **{n: getattr(pipe, n) for n in names},
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    other.set_progress_bar_config(disable=True)
    wanted = other(
        **given,
        image=picture,
        strength=0.7,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        return_dict=False,
    )[0]
    found = large(pipe, picture, kind, (32, 32), **PLAIN)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # In the first step one region that is the whole picture sees its own maps and its own low frequencies.
    once = {"size": (32, 32), "strength": 0.2}
    plain = large(pipe, picture, kind, **{**PLAIN, **once})
    again = large(pipe, picture, kind, mix=(0.0, 0.0), **once)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart"])
def test_a_pipeline_enlarges_and_is_left_as_it_was(kind: str, picture: Tensor) -> None:
    pipe = pipeline(kind)
    model = pipe.unet if kind != "pixart" else pipe.transformer
    scheduler = dict(vars(pipe.scheduler))
    processors = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    image = large(pipe, picture, kind, (64, 96), output_type="pt")
    assert image.shape == (1, 3, 64, 96) and bool(((image >= 0) & (image <= 1)).all()) and float(image.std()) > 0
    assert torch.equal(large(pipe, picture, kind, (64, 96), output_type="pt"), image)
    assert {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")} == processors
    assert not open_handles(model) and vars(pipe.scheduler).keys() == scheduler.keys()


@pytest.mark.parametrize(
    "changed",
    [
        {"structure": 0.0},
        {"rap": "gate"},
        {"rap": "off"},
        {"jitter": False},
        {"window": (8, 8)},
        {"overlap": 0.75},
        {"filter": "ideal"},
        {"cutoff": 0.2},
        {"capture_every": 3},
        {"strength": 0.4},
    ],
)
def test_every_setting_changes_the_picture(changed: dict[str, Any], picture: Tensor) -> None:
    pipe = pipeline("sdxl")
    assert not torch.allclose(large(pipe, picture), large(pipe, picture, **changed), atol=1e-4)


def test_regions_in_one_call_or_alone(picture: Tensor) -> None:
    pipe = pipeline("sd15")
    torch.testing.assert_close(
        large(pipe, picture, "sd15", region_batch=1), large(pipe, picture, "sd15", region_batch=9), rtol=1e-3, atol=1e-3
    )


def test_the_structure_prior_keeps_the_layout(picture: Tensor) -> None:
    pipe = pipeline("sd15")
    clean = denoiser_of(pipe).encode(torch.nn.functional.interpolate(picture, (64, 64), mode="bicubic") * 2 - 1, None)

    def distance(**more: Any) -> float:
        found = large(pipe, picture, "sd15", **{**PLAIN, **more})
        return float((low_pass(found, (0.25, 0.25)) - low_pass(clean, (0.25, 0.25))).square().mean())

    assert distance(structure=1.0, structure_share=1.0) < 0.8 * distance()


def test_every_region_may_have_a_prompt_of_its_own(picture: Tensor) -> None:
    pipe, seen = pipeline("sdxl"), []

    def prompter(region: Tensor, prompt: str) -> Words:
        seen.append((tuple(region.shape), prompt))
        return text(10 + len(seen))

    plain = large(pipe, picture)
    found = large(pipe, picture, prompter=prompter)
    assert seen == [((3, 32, 32), "")] * 9
    assert not torch.allclose(found, plain, atol=1e-3)
    same = large(pipe, picture, prompter=lambda region, prompt: text(1))
    torch.testing.assert_close(same, plain, rtol=1e-3, atol=1e-3)
    seen.clear()
    torch.testing.assert_close(
        large(pipe, picture, prompter=prompter, mix=(0.0, 0.0)), large(pipe, picture, mix=(0.0, 0.0)), rtol=0, atol=0
    )
    assert not seen


def test_pictures_of_a_batch_are_apart(picture: Tensor) -> None:
    pipe = pipeline("sd15")
    both = torch.cat([picture, picture.flip(3)])
    found = large(pipe, both, "sd15", jitter=False)
    assert found.shape[0] == 2 and not torch.allclose(found[0], found[1], atol=1e-2)
    pairs = Words(torch.cat([text(1, "sd15").embeds, text(5, "sd15").embeds]))
    other = large(pipe, both, "sd15", jitter=False, prompt=pairs)
    torch.testing.assert_close(other[0], found[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(other[1], found[1], atol=1e-3)


def test_all_share_one_field_of_noise(picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small picture's noise is a selection of the large one's; structure uses the very field of the start."""
    denoiser, seen = denoiser_of(pipeline("sd15")), []
    real = denoiser.noised
    monkeypatch.setattr(
        denoiser, "noised", lambda clean, noise, level: (seen.append(noise), real(clean, noise, level))[1]
    )
    upscale(denoiser, picture, 64, 64, text(1, "sd15"), negative=text(2, "sd15"), output_type="latent", **FEW)
    field = seen[0]
    assert all(torch.equal(n, field) for n in seen if n.shape == field.shape)
    small = [n for n in seen if n.shape != field.shape]
    assert len(small) == 3 and all(bool(torch.isin(n, field).all()) for n in small)
    assert float(small[0].std()) == pytest.approx(1, abs=0.1)


def test_words_and_pictures_of_pil(picture: Tensor) -> None:
    from PIL import Image

    pipe = pipeline("sd15")
    array = (picture[0] * 255).round().byte().movedim(0, -1).numpy()
    found = large(pipe, Image.fromarray(np.asarray(array)), "sd15")
    given = torch.from_numpy(array).movedim(-1, 0).float() / 255
    assert torch.equal(found, large(pipe, given, "sd15"))


def test_refusals(picture: Tensor) -> None:
    pipe = pipeline("sdxl")
    for size, why in (
        ((63, 64), r"height, width=\(63, 64\) pixels; legal: multiples of 2, nearest: \(64, 64\)"),
        ((16, 64), r"height, width=\(16, 64\) is smaller than the picture of \(32, 32\)"),
    ):
        with pytest.raises(ValueError, match=why):
            large(pipe, picture, size=size)
    with pytest.raises(ValueError, match=r"picture of shape \(1, 1, 4, 4\); legal: \[3, h, w\]"):
        large(pipe, torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="stps=3 is unknown; legal: steps, strength"):
        large(pipe, picture, stps=3)
    with pytest.raises(ValueError, match="output_type='pil'; legal: 'pt', 'latent'"):
        large(pipe, picture, output_type="pil")
    with pytest.raises(ValueError, match="prompt has 3 rows for 1 pictures; legal: 1 or as many"):
        large(pipe, picture, prompt=text(1).rows([0, 0, 0]))
    with pytest.raises(ValueError, match="words of Stable Diffusion XL need pooled embeddings"):
        large(pipe, picture, prompt=Words(text(1).embeds), negative=Words(text(2).embeds))
    with pytest.raises(ValueError, match=r"the prompter's words are \(5, 32\), the prompt's \(7, 32\)"):
        large(pipe, picture, prompter=lambda region, prompt: Words(torch.zeros(1, 5, 32)))
    with pytest.raises(ValueError, match=r"the negative words are \(5, 32\), the prompt's \(7, 32\)"):
        large(pipe, picture, negative=Words(torch.zeros(1, 5, 32)))
    with pytest.raises(ValueError, match="the negative words have no pooled, unlike the prompt's; legal: both or"):
        large(pipe, picture, negative=Words(torch.zeros(1, 7, 32)))
    with pytest.raises(ValueError, match="the prompter's words have a mask, unlike the prompt's"):
        large(pipe, picture, prompter=lambda region, prompt: Words(torch.zeros(1, 7, 32), torch.ones(1, 7)))
    with pytest.raises(ValueError, match="Linear is no generator it knows; legal: pipelines of Stable Diffusion"):
        large(torch.nn.Linear(1, 1), picture)


def test_the_defaults_are_the_reconstruction() -> None:
    settings = CUpscaleSettings()
    assert (settings.steps, settings.strength, settings.guidance, settings.overlap) == (50, 0.7, 7.5, 0.5)
    assert (settings.rap, settings.mix, settings.structure, settings.structure_share) == (
        "replace",
        (0.3, 0.7),
        1.0,
        0.5,
    )
