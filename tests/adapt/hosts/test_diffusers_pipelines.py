"""Whole pipelines of diffusers, tiny and random: what a real sampling loop tells a method; nothing is changed by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt import attach, host_of

from .exam import Notes
from .sizes import COGVIDEOX, FLUX, HUNYUAN_VIDEO, WAN

REASON = "is not installed: pip install 'glocal[diffusers,transformers]'"
diffusers = pytest.importorskip("diffusers", reason=f"diffusers {REASON}")
pytest.importorskip("transformers", reason=f"transformers, without which diffusers has no pipelines, {REASON}")

COMMON: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False}


@pytest.fixture(autouse=True)
def weights() -> Any:
    """The same random weights in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def text(*shape: int) -> Tensor:
    return torch.randn(*shape)


def notes(pipe: Any, **arguments: Any) -> Notes:
    """Runs the pipeline without and with a method that changes nothing; the method."""
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    plain = pipe(**COMMON, **arguments, generator=torch.Generator().manual_seed(1))[0]
    method = Notes()
    with attach(pipe.transformer, method):
        watched = pipe(**COMMON, **arguments, generator=torch.Generator().manual_seed(1))[0]
    assert torch.equal(watched, plain)
    return method


def seen(method: Notes) -> list[tuple[int, str, int]]:
    return [(step, branch, call) for step, _, branch, call in method.seen]


def wan() -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    sizes = {**WAN, "in_channels": 16, "out_channels": 16}
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=diffusers.WanTransformer3DModel(**sizes),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


VIDEO: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9}


def test_wan_guides_in_two_calls() -> None:
    method = notes(
        wan(), prompt_embeds=text(1, 5, 16), negative_prompt_embeds=text(1, 5, 16), guidance_scale=4.0, **VIDEO
    )
    assert seen(method) == [(0, "cond", 0), (0, "uncond", 1), (1, "cond", 0), (1, "uncond", 1)]
    assert method.seen[0][1] == 1.0
    assert method.calls[0].layout.q.grid.axes == (3, 2, 3)


def test_a_pipeline_is_told_to_give_its_transformer() -> None:
    with pytest.raises(ValueError, match=r"No host adapter for .*WanPipeline\..* Attach to its transformer instead\."):
        host_of(wan())


def test_flux_calls_once() -> None:
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=diffusers.FluxTransformer2DModel(**FLUX),
    )
    method = notes(pipe, prompt_embeds=text(1, 5, 32), pooled_prompt_embeds=text(1, 24), height=16, width=24)
    assert seen(method) == [(0, "cond", 0), (1, "cond", 0)]
    assert [(p.name, p.shape) for p in method.calls[0].layout.q.parts] == [("text", 5), ("image", (4, 6))]


def test_hunyuan_video_calls_once() -> None:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN_VIDEO),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    method = notes(
        pipe,
        prompt_embeds=text(1, 5, 16),
        pooled_prompt_embeds=text(1, 8),
        prompt_attention_mask=mask,
        **VIDEO,
    )
    assert seen(method) == [(0, "cond", 0), (1, "cond", 0)]
    layout = method.calls[0].layout
    assert [(p.name, p.shape) for p in layout.q.parts] == [("video", (3, 4, 6)), ("text", 5)]
    assert layout.lengths["text"].tolist() == [3]


def test_cogvideox_guides_in_one_call() -> None:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=diffusers.CogVideoXTransformer3DModel(**COGVIDEOX),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    method = notes(pipe, prompt_embeds=text(1, 5, 8), negative_prompt_embeds=text(1, 5, 8), guidance_scale=6.0, **VIDEO)
    assert seen(method) == [(0, "both", 0), (1, "both", 0)]
    assert method.calls[-1].state.rows == ((0, "uncond"), (0, "cond"))
