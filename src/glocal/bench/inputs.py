"""Inputs on which attention is local, as it is in images and video: smooth random fields plus noise, from a seed.

Independent random q and k make every key count alike, and any sparse pattern then looks as bad as any other. Here q and
k of a token share a field that varies slowly over the canvas, so near tokens look at each other most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORDS = (
    "q and k = one smooth field + noise of their own, v = another smooth field + noise; fields are white noise under a "
    "Gaussian of an eighth of each axis, standard deviation 1, noise 0.33"
)


def local_inputs(
    shape: Sequence[int], heads: int, head_dim: int, generator: torch.Generator, *, noise: float = 0.33
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, heads, N, head_dim] in float32 on the CPU for a grid of axis lengths `shape`, in raster order.

    noise: standard deviation of the noise beside fields of standard deviation 1. A token's own logit is near
    sqrt(head_dim); logits fall off over about a quarter of each axis.
    """
    fields = [smooth_field(shape, heads * head_dim, generator) for _ in range(2)]
    q, k, v = (f + noise * torch.randn(f.shape, generator=generator) for f in (fields[0], fields[0], fields[1]))
    return tuple(t.unflatten(-1, (heads, head_dim)).transpose(0, 1)[None].contiguous() for t in (q, k, v))  # type: ignore[return-value]


def smooth_field(shape: Sequence[int], channels: int, generator: torch.Generator) -> Tensor:
    """White noise under a Gaussian whose width is an eighth of each axis, unit variance: float32 [N, channels]."""
    field = torch.randn(*shape, channels, generator=generator)
    for axis, length in enumerate(shape):
        place = torch.arange(length, dtype=torch.float32)
        width = max(length / 8, 0.5)
        weights = (-0.5 * ((place[:, None] - place[None]) / width) ** 2).exp()
        weights = weights / weights.square().sum(1, keepdim=True).sqrt()  # unit variance stays, at the border too
        field = (field.movedim(axis, -1) @ weights.T).movedim(-1, axis)
    return field.reshape(-1, channels)
