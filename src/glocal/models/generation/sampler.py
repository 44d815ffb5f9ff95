"""Draws clips from a rectified-flow model with Euler steps (arXiv 2209.03003).

The path from noise (sigma 1) to data (sigma 0) is walked at noise levels that a shift moves towards the noisy end,
where a clip of many tokens is decided (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2). Nothing random happens
after the first noise, so the same noise gives the same clip, and a run can be taken up at any step from its latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.models.generation.video_dit import VideoDiT


@dataclass(frozen=True)
class SampleSpec:
    """steps: Euler steps. shift: 1 spaces noise levels evenly, larger stays longer at high noise.

    guidance: None for one call a step; a scale s uses s * given + (1 - s) * not given (arXiv 2207.12598), two calls.
    """

    steps: int = 8
    shift: float = 6.0
    guidance: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1 step is needed; use steps=1")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}: must be above 0; 1.0 means no shift")


@dataclass(frozen=True)
class SampleStep:
    """What a callback sees after step `step` of `total`: sigma before and after, and the latent after it."""

    step: int
    total: int
    sigma: float
    next_sigma: float
    latent: Tensor


def noise_levels(spec: SampleSpec) -> tuple[float, ...]:
    """The steps + 1 noise levels from 1 down to 0."""
    even = [1 - i / spec.steps for i in range(spec.steps + 1)]
    return tuple(spec.shift * s / (1 + (spec.shift - 1) * s) for s in even)


def draw_noise(
    seed: int, batch: int = 1, frames: int = 16, height: int = 64, width: int = 64, channels: int = 3
) -> Tensor:
    """First latent [B, T, C, H, W] of a seed, float32, always drawn on the CPU so that devices agree."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, channels, height, width, generator=generator)


@torch.no_grad()
def sample(
    model: VideoDiT,
    latent: Tensor,
    condition: Tensor | None = None,
    spec: SampleSpec | None = None,
    *,
    start: int = 0,
    callback: Callable[[SampleStep], None] | None = None,
) -> Tensor:
    """Walk from `latent` [B, T, C, H, W] (noise, or the latent before step `start`) to a clip of the same shape.

    The clip is in about [-1, 1]; `to_pixels` maps it to [0, 1]. condition: [B | 1, fields], see `conditions`.
    Raises ValueError if `start` is not a step.
    """
    spec = SampleSpec() if spec is None else spec
    if not 0 <= start < spec.steps:
        last = spec.steps - 1
        raise ValueError(f"start={start}: must be a step in 0..{last}; nearest is {min(max(start, 0), last)}")
    parameter = next(model.parameters())
    x = latent.to(device=parameter.device, dtype=parameter.dtype)
    levels = noise_levels(spec)
    for step in range(start, spec.steps):
        sigma, target = levels[step], levels[step + 1]
        level = torch.full((len(x),), sigma, device=x.device)
        clean = model(x, level, condition)
        if spec.guidance is not None and condition is not None:
            free = model(x, level, None)
            clean = free + spec.guidance * (clean - free)
        # x = (1 - sigma) data + sigma noise: keep the noise, exchange the shares.
        x = clean + (target / sigma) * (x - clean)
        if callback is not None:
            callback(SampleStep(step, spec.steps, sigma, target, x))
    return x


def to_pixels(clip: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clipped."""
    return (clip.float() * 0.5 + 0.5).clamp(0, 1)


def from_pixels(video: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]."""
    return video * 2 - 1
