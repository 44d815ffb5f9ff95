"""The two stages around Scale-DiT (arXiv 2510.16325): a small image, and the same one denoised anew at full size.

``generate(pipe, handle, {"prompt": "a heron"}, Stages(size=(4096, 4096)))``; `handle` comes from
`glocal.adapt.scale_dit`. The small image is made by the untouched model; its latents guide the second stage, which
starts from its enlargement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from glocal.adapt import scale_dit_flux2
from glocal.adapt.attach import Handle
from glocal.adapt.scale_dit import ScaleDiT
from glocal.adapt.scale_dit_flux import position_ids
from glocal.adapt.tiled_vae import TiledVae

WORDS = ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds", "max_sequence_length")


@dataclass(frozen=True)
class Stages:
    """size, small: height and width in pixels. steps, guidance: of the small image.

    last_steps: how many of the last steps of the same schedule denoise the large image, with `last_guidance`.
    sharpen: how much of what a 3 x 3 Gaussian of width `blur` takes away is added to the enlarged image. start: whether
    the second stage starts from it; else from noise.
    """

    size: tuple[int, int] = (4096, 4096)
    small: tuple[int, int] = (1024, 1024)
    steps: int = 28
    guidance: float = 3.5
    last_steps: int = 18
    last_guidance: float = 4.5
    sharpen: float = 1.0
    blur: float = 1.0
    start: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.last_steps <= self.steps:
            raise ValueError(
                f"Stages: last_steps={self.last_steps} of steps={self.steps}; legal: 1 to {self.steps}, nearest: "
                f"{min(max(self.last_steps, 1), self.steps)}."
            )


def generate(
    pipe: Any,
    handle: Handle,
    prompt: Mapping[str, Any],
    stages: Stages | None = None,
    *,
    generator: torch.Generator | None = None,
    output_type: str = "pil",
) -> Any:
    """Images [batch] of the pipeline's `output_type`; "latent": packed latents.

    prompt: the words as the pipeline takes them, names of `WORDS`. stages: None takes the published 4096 x 4096 pixels;
    for FLUX.2 those are `KLEIN` and `KLEIN_BASE` of `glocal.adapt.scale_dit_run_flux2`, by the pipeline.
    Raises ValueError for a handle of another method or model, and sizes that fill no tokens.
    """
    method = handle.method
    if not isinstance(method, ScaleDiT) or method.model is not pipe.transformer:
        raise ValueError(
            "generate: the handle is not of scale_dit on this pipeline; legal: handle = scale_dit(pipe, ...)."
        )
    if method.family is scale_dit_flux2:
        from glocal.adapt import scale_dit_run_flux2

        return scale_dit_run_flux2.generate(pipe, method, prompt, stages, generator, output_type)
    stages = Stages() if stages is None else stages
    side = checked(pipe, prompt, stages, WORDS)
    method.give(None)
    small = small_picture(pipe, prompt, stages, generator)
    sigmas = pipe.scheduler.sigmas[-(stages.last_steps + 1) :].tolist()
    with torch.no_grad():
        start = enlarged(pipe, small, stages, generator) if stages.start else None
        method.give(small, (stages.small[0] // side, stages.small[1] // side))
        try:
            large = _denoised(pipe, prompt, stages, start, sigmas, small, generator)
        finally:
            method.give(None)
        if output_type == "latent":
            return large
        return pipe.image_processor.postprocess(_decoded(pipe, large, stages.size), output_type=output_type)


def checked(pipe: Any, prompt: Mapping[str, Any], stages: Stages, words: tuple[str, ...]) -> int:
    """Pixels of a token; ValueError for a name that is none of `words` and for sizes that are no whole tokens."""
    for name in prompt:
        if name not in words:
            raise ValueError(f"generate: prompt has {name!r}; legal: {', '.join(words)}.")
    side = pipe.vae_scale_factor * 2
    for name in ("size", "small"):
        if any(n % side for n in getattr(stages, name)):
            raise ValueError(f"generate: {name}={getattr(stages, name)} pixels; legal: multiples of {side}.")
    return side


def small_picture(
    pipe: Any, prompt: Mapping[str, Any], stages: Stages, generator: torch.Generator | None = None
) -> Tensor:
    """Latents of the small image as the pipeline returns them."""
    return pipe(
        **prompt,
        height=stages.small[0],
        width=stages.small[1],
        num_inference_steps=stages.steps,
        guidance_scale=stages.guidance,
        generator=generator,
        output_type="latent",
    ).images


def enlarged(pipe: Any, latents: Tensor, stages: Stages, generator: torch.Generator | None = None) -> Tensor:
    """Packed latents of the small image -> packed latents of its bicubic, sharpened enlargement."""
    image = _decoded(pipe, latents, stages.small).float()
    image = interpolate(image, size=stages.size, mode="bicubic", align_corners=False)
    image = image + stages.sharpen * (image - gaussian(image, stages.blur))
    image = ((image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1  # as an image file would hold it
    with TiledVae(pipe.vae):
        found = pipe.vae.encode(image.to(pipe.vae.dtype)).latent_dist.sample(generator)
    found = (found - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return pipe._pack_latents(found, *found.shape).to(latents.dtype)


def gaussian(image: Tensor, width: float) -> Tensor:
    """image [B, C, H, W] under a 3 x 3 Gaussian of standard deviation `width` pixels, borders mirrored."""
    line = torch.exp(-0.5 * (torch.arange(-1, 2, device=image.device, dtype=image.dtype) / width) ** 2)
    line = line / line.sum()
    kernel = (line[:, None] * line).expand(image.shape[1], 1, 3, 3)
    return conv2d(pad(image, (1, 1, 1, 1), mode="reflect"), kernel, groups=image.shape[1])


def _denoised(
    pipe: Any,
    prompt: Mapping[str, Any],
    stages: Stages,
    start: Tensor | None,
    sigmas: list[float],
    small: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Euler steps of the flow from the first to the last of `sigmas` (noise levels), packed latents [B, N, C]."""
    given = {"prompt": None, "prompt_2": None} | dict(prompt)
    text, pooled, text_ids = pipe.encode_prompt(**given, device=small.device)
    side = pipe.vae_scale_factor * 2
    shape = stages.size[0] // side, stages.size[1] // side
    x = torch.randn(
        small.shape[0], shape[0] * shape[1], small.shape[2], generator=generator,
        device=small.device if generator is None else generator.device,
    ).to(small)  # fmt: skip
    if start is not None:
        x = (1 - sigmas[0]) * start + sigmas[0] * x
    level = x.new_ones(x.shape[0])
    guided = level * stages.last_guidance if pipe.transformer.config.guidance_embeds else None
    for now, after in pairwise(sigmas):
        velocity = pipe.transformer(
            hidden_states=x,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=level * now,
            guidance=guided,
            img_ids=position_ids(shape, text_ids),
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        x = x + (after - now) * velocity
    return x


def _decoded(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Packed latents -> image [B, 3, H, W] in [-1, 1]."""
    found = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    found = found / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with TiledVae(pipe.vae):
        return pipe.vae.decode(found.to(pipe.vae.dtype), return_dict=False)[0]
