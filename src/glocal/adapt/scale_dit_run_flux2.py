"""The two stages around Scale-DiT in FLUX.2 (second generation of arXiv 2510.16325); `scale_dit_run.generate` calls it.

A small image by the untouched model, then the large one from noise under its guidance: few steps without guidance for
the distilled models, real classifier-free guidance for the others. The schedule's shift is that of the small image.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from glocal.adapt.scale_dit import ScaleDiT
from glocal.adapt.scale_dit_flux2 import position_ids
from glocal.adapt.scale_dit_run import Stages, checked, small_picture
from glocal.adapt.tiled_vae import TiledVae

WORDS = ("prompt", "prompt_embeds", "negative_prompt_embeds", "max_sequence_length")

KLEIN = Stages(steps=4, guidance=1.0, last_steps=4, last_guidance=1.0, start=False)
"""The distilled models."""
KLEIN_BASE = Stages(steps=50, guidance=4.0, last_steps=18, last_guidance=4.0, start=False)
"""The models with guidance."""


def generate(
    pipe: Any,
    method: ScaleDiT,
    prompt: Mapping[str, Any],
    stages: Stages | None,
    generator: torch.Generator | None,
    output_type: str,
) -> Any:
    """Images of the pipeline's `output_type`; "latent": packed latents. See `scale_dit_run.generate`."""
    if stages is None:
        stages = KLEIN if pipe.config.get("is_distilled", False) else KLEIN_BASE
    side = checked(pipe, prompt, stages, WORDS)
    real = stages.guidance > 1 and not pipe.transformer.config.guidance_embeds
    if real and "negative_prompt_embeds" not in prompt and prompt.get("prompt") is None:
        raise ValueError(
            f"generate: guidance={stages.guidance} with prompt_embeds alone; legal: negative_prompt_embeds beside "
            "them, or guidance=1."
        )
    method.give(None)
    small = small_picture(pipe, prompt, stages, generator)
    with torch.no_grad():
        low = packed(pipe, small)
        grid = (stages.small[0] // side, stages.small[1] // side)
        method.give(low, grid)
        try:
            large = _denoised(pipe, prompt, stages, low, grid, generator)
        finally:
            method.give(None)
        if output_type == "latent":
            return large
        return pipe.image_processor.postprocess(_decoded(pipe, large, stages.size), output_type=output_type)


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """Latents as the pipeline returns them [B, C, h, w] -> tokens as its transformer takes them [B, N, 4 C]."""
    mean, deviation = _normal(pipe, latents)
    return pipe._pack_latents((pipe._patchify_latents(latents) - mean) / deviation)


def enlarged(low: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens of a small image -> those of its bicubic enlargement in latent space, [B, rows * columns, C]."""
    maps = low.transpose(1, 2).unflatten(2, grid)
    return interpolate(maps.float(), size=size, mode="bicubic", align_corners=False).to(low).flatten(2).transpose(1, 2)


def _denoised(
    pipe: Any,
    prompt: Mapping[str, Any],
    stages: Stages,
    low: Tensor,
    grid: tuple[int, int],
    generator: torch.Generator | None,
) -> Tensor:
    """Euler steps of the flow, packed latents [B, N, C]."""
    more = {name: prompt[name] for name in ("max_sequence_length",) if name in prompt}
    words = [pipe.encode_prompt(prompt.get("prompt"), low.device, 1, prompt.get("prompt_embeds"), **more)]
    guided = not pipe.transformer.config.guidance_embeds
    if guided and stages.last_guidance > 1:
        words.append(pipe.encode_prompt("", low.device, 1, prompt.get("negative_prompt_embeds"), **more))
    side = pipe.vae_scale_factor * 2
    shape = (stages.size[0] // side, stages.size[1] // side)
    sigmas = _levels(pipe, stages, low.shape[1])
    x = torch.randn(
        low.shape[0], shape[0] * shape[1], low.shape[2], generator=generator,
        device=low.device if generator is None else generator.device,
    ).to(low)  # fmt: skip
    if stages.start:
        x = (1 - sigmas[0]) * enlarged(low, grid, shape) + sigmas[0] * x
    level = x.new_ones(x.shape[0])
    ids = position_ids(shape, words[0][1][0] if words[0][1].dim() == 3 else words[0][1])
    for now, after in pairwise(sigmas):
        found = [
            pipe.transformer(
                hidden_states=x,
                encoder_hidden_states=text,
                timestep=level * now,
                guidance=None if guided else level * stages.last_guidance,
                img_ids=ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
            for text, text_ids in words
        ]
        velocity = found[0] if len(found) == 1 else found[1] + stages.last_guidance * (found[0] - found[1])
        x = x + (after - now) * velocity
    return x


def _levels(pipe: Any, stages: Stages, tokens: int) -> list[float]:
    """Noise levels of the large image, with the shift of `tokens` of the small one.

    The last steps of the small image's schedule where the large one starts from it; from noise, as many steps of their
    own.
    """
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    if stages.start:
        return pipe.scheduler.sigmas[-(stages.last_steps + 1) :].tolist()
    steps = stages.last_steps
    scheduler: Any = type(pipe.scheduler).from_config(pipe.scheduler.config)
    mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas.tolist()


def _decoded(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Packed latents -> image [B, 3, H, W] in [-1, 1]."""
    side = pipe.vae_scale_factor * 2
    maps = latents.transpose(1, 2).unflatten(2, (size[0] // side, size[1] // side))
    mean, deviation = _normal(pipe, maps)
    with TiledVae(pipe.vae) as vae:
        return vae.decode(pipe._unpatchify_latents(maps * deviation + mean).to(vae.dtype), return_dict=False)[0]


def _normal(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of latents, [1, 4 C, 1, 1]."""
    norm = pipe.vae.bn
    mean, variance = (t.view(1, -1, 1, 1).to(like) for t in (norm.running_mean, norm.running_var))
    return mean, (variance + pipe.vae.config.batch_norm_eps).sqrt()
