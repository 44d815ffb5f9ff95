"""FreeSwim's second stage on a tiny Wan pipeline: which part of the schedule runs, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glocal.adapt import open_handles
from glocal.adapt.freeswim import FreeSwimSettings
from glocal.adapt.freeswim_refine import frames_of, refine, second_stage

from .test_pipelines import generate, wan

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

NEAR = FreeSwimSettings((1, 1), cache_steps=2)


@pytest.fixture
def pipe() -> Any:
    found = wan()
    found.transformer_2 = None
    return found


def refined(pipe: Any, video: Tensor, settings: FreeSwimSettings = NEAR, **more: Any) -> Tensor:
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    return refine(
        pipe,
        video,
        64,
        96,
        settings=settings,
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        num_inference_steps=10,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        **more,
    ).frames


def test_the_last_share_of_the_steps_runs_at_the_large_size(pipe: Any, generator: torch.Generator) -> None:
    video = torch.rand(5, 3, 24, 40, generator=generator)
    plain, levels, sizes = generate(pipe), [], set()

    def before(_: Any, __: Any, given: dict[str, Any]) -> None:
        levels.append(float(given["timestep"].max()))
        sizes.add(tuple(given["hidden_states"].shape))

    hook = pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    out = refined(pipe, video)
    hook.remove()
    assert out.shape == (1, 16, 2, 8, 12) and sizes == {(1, 16, 2, 8, 12)} and bool(out.isfinite().all())
    assert len(levels) == 14 and levels[0::2] == levels[1::2]  # seven steps of ten, with and without guidance
    shift = 9.0
    sigma = 0.7  # of a straight schedule after three of ten steps, before it is shifted
    assert levels[0] / 1000 == pytest.approx(shift * sigma / (1 + (shift - 1) * sigma), abs=2e-3)
    assert torch.equal(generate(pipe), plain) and not open_handles(pipe)
    assert not torch.allclose(out, refined(pipe, video, FreeSwimSettings((1, 1), dual_steps=0)))


def test_strength_says_how_much_of_the_video_stays(pipe: Any, generator: torch.Generator) -> None:
    one, two = (torch.rand(5, 3, 24, 40, generator=generator) for _ in range(2))
    apart = [float((refined(pipe, one, strength=s) - refined(pipe, two, strength=s)).norm()) for s in (0.1, 0.9)]
    assert apart[0] > apart[1]


def test_frames_in_every_form() -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    codes = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    wanted = torch.from_numpy(codes).permute(0, 3, 1, 2) / 255
    for video in (codes, codes.astype(np.float32) / 255, [image.fromarray(c) for c in codes], wanted):
        torch.testing.assert_close(frames_of(video), wanted)
    with pytest.raises(ValueError, match=r"refine: frames of shape \(2, 3, 4\); legal: a tensor \[F, 3, h, w\]"):
        frames_of(codes[..., 0])


def test_refusals(pipe: Any) -> None:
    video = torch.rand(5, 3, 16, 16)
    with pytest.raises(ValueError, match=r"refine: strength=0 must lie above 0 and at most at 1; the published one is"):
        refine(pipe, video, 64, 96, strength=0)
    with pytest.raises(ValueError, match=r"refine: height=70 must be a multiple of 16; nearest: 64\."):
        refine(pipe, video, 70, 96)
    with pytest.raises(ValueError, match=r"refine: WanPipeline has two transformers; legal: a pipeline of Wan 2\.1"):
        second_stage(wan(boundary_ratio=0.8))
