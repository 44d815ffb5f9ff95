"""Fewer tokens: means, convolutions, resizing, softmax pooling, or means over any Partition.

HiLo (arXiv 2205.13213) and SG-Former (arXiv 2308.12216) pool keys, BiFormer (arXiv 2303.08810) pools regions, FlashVGGT
(arXiv 2512.01540) resizes feature maps. The result says where its cells lie and how many tokens each stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.canvas import Canvas, Part
from glocal.ops.score import PerKey
from glocal.routing.partition import Partition

Anchor = Literal["centre", "first"]
PerAxis = int | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Pooled:
    """tokens: [B, M, C] or [B, H, M, D], as x. canvas: where the cells lie; its grid is called "<grid>.pooled".
    counts: tokens behind each cell, float32 [B|1, H|1, M]; None where the method knows no number.
    """

    tokens: Tensor
    canvas: Canvas
    counts: Tensor | None

    def log_counts(self) -> PerKey:
        """The bias that lets a cell weigh as much as the tokens behind it; empty cells are hidden."""
        if self.counts is None:
            raise ValueError("log_counts: softmax pooling has no number of tokens for each cell.")
        return PerKey(self.counts.log())


class Method(Protocol):
    """One way to pool."""

    def run(self, x: Tensor, canvas: Canvas) -> Pooled:
        """x: [B, H, N, D] on `canvas`."""
        ...


def pool(x: Tensor, canvas: Canvas, method: Method) -> Pooled:
    """Pool tokens x [B, N, C] or [B, H, N, D] that lie on `canvas`.

    method: MeanPool, ConvPool, ResizePool, SoftmaxPool or GroupPool. All but the last two need a canvas of one grid.
    Raises ValueError where shapes do not fit.
    """
    if x.dim() not in (3, 4) or x.shape[-2] != canvas.size:
        raise ValueError(
            f"pool: x of shape {tuple(x.shape)} must be [batch, {canvas.size}, channels] or "
            f"[batch, heads, {canvas.size}, head size] for {canvas!r}."
        )
    found = method.run(x if x.dim() == 4 else x[:, None], canvas)
    return found if x.dim() == 4 else Pooled(found.tokens[:, 0], found.canvas, found.counts)


@dataclass(frozen=True)
class MeanPool:
    """Means over windows along each axis.

    window, stride: tokens, one value or one an axis; stride None is the window. A last window may be cut off.
    count: divide by the tokens really there ("true") or by the whole window ("fixed").
    anchor: a cell lies at the centre of its window or at its first token.
    """

    window: PerAxis
    stride: PerAxis | None = None
    count: Literal["true", "fixed"] = "true"
    anchor: Anchor = "centre"

    def run(self, x: Tensor, canvas: Canvas) -> Pooled:
        """x: [B, H, N, D]."""
        grid = _grid(canvas, 3)
        window = _axes("window", self.window, grid)
        stride = window if self.stride is None else _axes("stride", self.stride, grid)
        maps = _maps(x.to(torch.promote_types(x.dtype, torch.float32)), grid, 3)  # [B * H, D, ., ., .]
        sums, counts = (_sums(t, window, stride) for t in (maps, torch.ones_like(maps[:1, :1])))
        means = sums / (counts if self.count == "true" else prod(window))
        offset = tuple((w - 1) / 2 for w in window) if self.anchor == "centre" else (0.0,) * len(window)
        return _pooled(means, x, grid, tuple(map(float, stride)), offset, counts)


@dataclass(frozen=True, eq=False)
class ConvPool:
    """A strided convolution with given weights over the channels of each head.

    weight: [C out, C in / groups, *kernel]; groups = C makes it depthwise. stride None is the kernel.
    padding: zeros on both sides of an axis.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: PerAxis | None = None
    padding: PerAxis = 0
    groups: int = 1
    anchor: Anchor = "centre"

    def run(self, x: Tensor, canvas: Canvas) -> Pooled:
        """x: [B, H, N, D]."""
        grid = _grid(canvas, 3)
        rank = len(grid.axes)
        if self.weight.dim() != rank + 2:
            raise ValueError(
                f"ConvPool: weight of shape {tuple(self.weight.shape)} needs {rank} kernel axes for the grid "
                f"{grid.axes}."
            )
        kernel = tuple(self.weight.shape[2:])
        stride = kernel if self.stride is None else _axes("stride", self.stride, grid)
        padding = _axes("padding", self.padding, grid, least=0)
        conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        maps = _maps(x, grid, rank)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        found = conv(maps, self.weight.to(x.dtype), bias, stride, padding, 1, self.groups)
        ones = torch.ones(1, 1, *grid.axes, device=x.device)
        counts = conv(ones, torch.ones(1, 1, *kernel, device=x.device), None, stride, padding)
        centre = tuple((w - 1) / 2 if self.anchor == "centre" else 0.0 for w in kernel)
        offset = tuple(c - p for c, p in zip(centre, padding, strict=True))
        return _pooled(found, x, grid, tuple(map(float, stride)), offset, counts)


@dataclass(frozen=True)
class ResizePool:
    """Resize the grid to `size` by linear or nearest interpolation (half-pixel centres)."""

    size: PerAxis
    mode: Literal["bilinear", "nearest"] = "bilinear"
    anchor: Anchor = "centre"

    def run(self, x: Tensor, canvas: Canvas) -> Pooled:
        """x: [B, H, N, D]."""
        grid = _grid(canvas, 3)
        size = _axes("size", self.size, grid)
        if self.mode not in ("bilinear", "nearest"):
            raise ValueError(f"ResizePool: mode={self.mode!r}; legal: 'bilinear', 'nearest'.")
        rank = len(size)
        maps = _maps(x, grid, rank)
        if self.mode == "nearest":
            found = F.interpolate(maps, size=size, mode="nearest-exact")
        else:
            found = F.interpolate(maps, size=size, mode=("linear", "bilinear", "trilinear")[rank - 1])
        step = tuple(n / s for n, s in zip(grid.axes, size, strict=True))
        offset = tuple((s - 1) / 2 if self.anchor == "centre" else 0.0 for s in step)
        counts = torch.full((1, 1, *size), prod(step), device=x.device)
        return _pooled(found, x, grid, step, offset, counts)


@dataclass(frozen=True, eq=False)
class SoftmaxPool:
    """Cell m is sum over n of softmax(logits[m])[n] * x[n].

    logits: [M, N], [B|1, M, N] or [B|1, H|1, M, N]; -inf hides a token.
    """

    logits: Tensor

    def run(self, x: Tensor, canvas: Canvas) -> Pooled:
        """x: [B, H, N, D]."""
        logits = self.logits
        if logits.dim() not in (2, 3, 4) or logits.shape[-1] != x.shape[2]:
            raise ValueError(
                f"SoftmaxPool: logits of shape {tuple(logits.shape)} must be [..., cells, {x.shape[2]} tokens]."
            )
        if logits.dim() == 3:
            logits = logits[:, None]
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        weights = torch.where(weights.isnan(), 0, weights)  # a cell that sees nothing is 0
        return Pooled(weights.to(x.dtype) @ x, Canvas([Part("pooled", logits.shape[-2])]), None)


@dataclass(frozen=True, eq=False)
class GroupPool:
    """Mean of each group of a Partition, over its true count or a fixed `divisor`; empty groups give 0."""

    part: Partition
    divisor: int | None = None

    def run(self, x: Tensor, canvas: Canvas) -> Pooled:
        """x: [B, H, N, D]."""
        part = self.part.to(x.device)
        means = part.mean(x)
        counts = part.counts.float()
        if self.divisor is not None:
            means = means * (counts / self.divisor)[..., None].to(means.dtype)
        shape = part.groups if part.shape is None else part.shape
        return Pooled(means.to(x.dtype), Canvas([Part("pooled", shape)]), counts)


def _grid(canvas: Canvas, most: int) -> Part:
    grid = canvas.grid
    if grid.tokens != canvas.size or len(grid.axes) > most:
        raise ValueError(
            f"pool: {canvas!r} must be one grid of at most {most} axes; pool its grid alone, or use GroupPool."
        )
    return grid


def _axes(name: str, value: PerAxis, grid: Part, least: int = 1) -> tuple[int, ...]:
    axes = (value,) * len(grid.axes) if isinstance(value, int) else tuple(value)
    if len(axes) != len(grid.axes) or min(axes) < least:
        raise ValueError(
            f"pool: {name}={value} needs {len(grid.axes)} entries of at least {least} for the grid {grid.axes}."
        )
    return axes


def _maps(x: Tensor, grid: Part, rank: int) -> Tensor:
    """[B, H, N, D] as channels-first maps [B * H, D, *axes], with leading axes of 1 up to `rank`."""
    axes = (1,) * (rank - len(grid.axes)) + grid.axes
    return x.flatten(0, 1).transpose(1, 2).unflatten(2, axes)


def _sums(maps: Tensor, window: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Sums over windows, the last one cut off where it leaves the grid but never starting outside."""
    lead = (1,) * (3 - len(window))
    window, stride = lead + window, lead + stride
    axes = maps.shape[2:]
    cells = [max(-(-(n - w) // s), 0) + 1 for n, w, s in zip(axes, window, stride, strict=True)]
    cells = [c - 1 if (c - 1) * s >= n else c for c, s, n in zip(cells, stride, axes, strict=True)]
    need = [(c - 1) * s + w - n for c, s, w, n in zip(cells, stride, window, axes, strict=True)]
    pads = [p for extra in reversed(need) for p in (0, max(extra, 0))]
    return F.avg_pool3d(F.pad(maps, pads), window, stride, divisor_override=1)


def _pooled(
    maps: Tensor, x: Tensor, grid: Part, step: tuple[float, ...], offset: tuple[float, ...], counts: Tensor
) -> Pooled:
    """Cells [B * H, D, *axes] as tokens, with their place in the frame of the grid."""
    axes = tuple(maps.shape[-len(grid.axes) :])
    tokens = maps.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2]).to(x.dtype)  # [B, H, M, D]
    scales = (grid.scale,) * len(axes) if isinstance(grid.scale, (int, float)) else grid.scale
    starts = (grid.offset,) * len(axes) if isinstance(grid.offset, (int, float)) else grid.offset
    scale = tuple(a * b for a, b in zip(scales, step, strict=True))
    start = tuple(a + b * c for a, b, c in zip(starts, scales, offset, strict=True))
    part = Part(f"{grid.name}.pooled", axes, scale=_one(scale), offset=_one(start))
    return Pooled(tokens, Canvas([part]), counts.float().reshape(1, 1, -1))


def _one(values: tuple[float, ...]) -> float | tuple[float, ...]:
    """One number where all axes agree."""
    return values[0] if len(set(values)) == 1 else values
