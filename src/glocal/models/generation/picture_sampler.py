"""Draws pictures from captions: Euler steps of the rectified flow, classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glocal.models.generation.picture_model import PictureModel
from glocal.models.generation.sampler import SampleSpec, SampleStep, noise_levels

PICTURE_SPEC = SampleSpec(steps=20, shift=3.0, guidance=3.0)
"""How the shipped image models are run where nothing else is said."""


@torch.no_grad()
def sample_pictures(
    model: PictureModel,
    latents: Tensor,
    tokens: Tensor,
    spec: SampleSpec = PICTURE_SPEC,
    *,
    start: int = 0,
    callback: Callable[[SampleStep], Tensor | None] | None = None,
) -> Tensor:
    """latents [B, 12, h, w] (noise, or what lies before step `start`), tokens [B, L] -> clean latents.

    callback: sees every step, and may return other latents to go on with. Guided steps are two calls, the caption's
    first. Raises ValueError if `start` is not a step, or tokens and latents differ in number.
    """
    if not 0 <= start < spec.steps:
        raise ValueError(f"start={start}: must be a step in 0..{spec.steps - 1}")
    if len(tokens) != len(latents):
        raise ValueError(f"{len(tokens)} captions for {len(latents)} latents; legal: one each")
    parameter = next(model.parameters())
    x = latents.to(device=parameter.device, dtype=parameter.dtype)
    words = model.encoder(tokens.to(parameter.device))
    silent = model.encoder(torch.zeros_like(tokens, device=parameter.device))
    levels = noise_levels(spec)
    for step in range(start, spec.steps):
        sigma, target = levels[step], levels[step + 1]
        level = torch.full((len(x),), sigma, device=x.device)
        clean = model(x, level, words)
        if spec.guidance is not None and spec.guidance != 1:
            free = model(x, level, silent)
            clean = free + spec.guidance * (clean - free)
        x = clean + (target / sigma) * (x - clean)
        if callback is not None:
            other = callback(SampleStep(step, spec.steps, sigma, target, x))
            x = x if other is None else other
    return x
