"""Flow-matching loss with clean-data prediction (rectified flow, arXiv 2209.03003; prediction, arXiv 2511.13720).

A clip x is mixed with noise e as (1 - s) x + s e. The error of the predicted clean clip, divided by s, is the error of
the velocity; the division is bounded so that almost clean inputs do not rule the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlowSpec:
    """shift: moves noise levels up (see the sampler). spread: of the logit-normal. uniform: share of even levels.

    pure: share of clips that are noise alone, where each sample begins. floor: smallest noise level the error is
    divided by. drop: probability that a condition, and that one of its fields, is left out.
    """

    shift: float = 2.0
    spread: float = 1.0
    uniform: float = 0.15
    pure: float = 0.08
    floor: float = 0.2
    drop: float = 0.1


def draw_levels(
    count: int, spec: FlowSpec, generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> Tensor:
    """Noise levels [count] in (0, 1], drawn on `device`: logit-normal or even and then shifted, or 1."""
    more: dict[str, Any] = {"generator": generator, "device": device}
    normal = torch.sigmoid(spec.spread * torch.randn(count, **more))
    even = 1 - torch.rand(count, **more)
    level = torch.where(torch.rand(count, **more) < spec.uniform, even, normal)
    shifted = spec.shift * level / (1 + (spec.shift - 1) * level)
    return torch.where(torch.rand(count, **more) < spec.pure, 1.0, shifted)


def flow_loss(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    clips: Tensor,
    condition: Tensor,
    spec: FlowSpec,
    generator: torch.Generator,
) -> Tensor:
    """Mean velocity error of `predict(noisy, level, condition)` over clips [B, ...] in [-1, 1]; a scalar.

    Noise, levels and dropped conditions come from `generator` on the CPU, so that devices draw alike.
    """
    count, device = len(clips), clips.device
    level = draw_levels(count, spec, generator).to(device)
    noise = torch.randn(clips.shape, generator=generator).to(device)
    keep = torch.rand(condition.shape, generator=generator) >= spec.drop
    keep &= torch.rand(count, 1, generator=generator) >= spec.drop
    share = level.view(-1, *[1] * (clips.ndim - 1))
    clean = predict(torch.lerp(clips, noise, share), level, condition * keep.to(device))
    return ((clean.float() - clips) / share.clamp(min=spec.floor)).square().mean()
