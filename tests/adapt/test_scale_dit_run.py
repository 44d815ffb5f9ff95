"""The two stages of Scale-DiT in a tiny Flux pipeline with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt import scale_dit
from glocal.adapt.scale_dit_run import Stages, enlarged, gaussian, generate

from .hosts.sizes import FLUX

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

STAGES = Stages(size=(32, 32), small=(8, 8), steps=4, last_steps=2)


@pytest.fixture
def pipe() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        found = diffusers.FluxPipeline(
            scheduler, vae.eval(), None, None, None, None, diffusers.FluxTransformer2DModel(**FLUX).eval()
        )
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def prompt(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "prompt_embeds": torch.randn(1, 5, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 24, generator=generator),
    }


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_both_stages_run_and_leave_the_pipeline_as_it_was(pipe: Any, prompt: dict[str, Tensor]) -> None:
    def plain() -> Tensor:
        return pipe(**prompt, height=8, width=8, num_inference_steps=2, output_type="latent", generator=seeded()).images

    before, levels = plain(), []
    with scale_dit(pipe, window=(4, 4), block=(16, 8)) as handle:
        watch = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: levels.append(
                (kwargs["hidden_states"].shape[1], float(kwargs["timestep"][0]))
            ),
            with_kwargs=True,
        )
        image = generate(pipe, handle, prompt, STAGES, generator=seeded(), output_type="pt")
        watch.remove()
        assert torch.equal(plain(), before)
    assert torch.equal(plain(), before)
    assert image.shape == (1, 3, 32, 32)
    assert [tokens for tokens, _ in levels] == [4] * 4 + [64] * 2
    assert [level for _, level in levels[4:]] == pytest.approx([level for _, level in levels[2:4]])
    assert pipe.vae.use_tiling is False


def test_the_small_image_decides_where_the_large_one_starts(pipe: Any, prompt: dict[str, Tensor]) -> None:
    small = torch.randn(1, 4, 16, generator=seeded())
    start = enlarged(pipe, small, STAGES, seeded())
    assert start.shape == (1, 64, 16)
    assert not torch.allclose(start, enlarged(pipe, small, Stages((32, 32), (8, 8), sharpen=0.0), seeded()))
    with scale_dit(pipe, window=(4, 4), block=(16, 8)) as handle:
        found = [
            generate(
                pipe,
                handle,
                prompt,
                Stages((32, 32), (8, 8), 4, last_steps=2, start=s),
                generator=seeded(),
                output_type="latent",
            )
            for s in (True, False)
        ]
    assert not torch.allclose(*found)


def test_the_blur_keeps_flat_images_and_means(generator: torch.Generator) -> None:
    flat = torch.full((1, 3, 5, 6), 0.25)
    torch.testing.assert_close(gaussian(flat, 0.7), flat)
    spot = torch.zeros(1, 1, 5, 5)
    spot[..., 2, 2] = 1
    spread = gaussian(spot, 1.0)[0, 0]
    assert float(spread.sum()) == pytest.approx(1)
    assert float(spread[1, 2] / spread[2, 2]) == pytest.approx(float(torch.tensor(-0.5).exp()))


def test_refusals(pipe: Any, prompt: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="last_steps=9 of steps=4; legal: 1 to 4, nearest: 4"):
        Stages(steps=4, last_steps=9)
    with scale_dit(pipe) as handle, pytest.raises(ValueError, match=r"size=\(30, 32\) pixels; legal: multiples of 4"):
        generate(pipe, handle, prompt, Stages((30, 32), (8, 8)))
    with scale_dit(pipe) as handle, pytest.raises(ValueError, match="prompt has 'seed'; legal: prompt, prompt_2"):
        generate(pipe, handle, {"seed": 3}, STAGES)
    with (
        scale_dit(diffusers.FluxTransformer2DModel(**FLUX)) as other,
        pytest.raises(ValueError, match="the handle is not of scale_dit on this pipeline"),
    ):
        generate(pipe, other, prompt, STAGES)
