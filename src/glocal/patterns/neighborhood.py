"""Neighbourhood attention with stride, dilation, causal axes (arXiv 2204.07143, 2209.15001, 2403.04690, 2504.16922)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor

from glocal.canvas import Coords, Layout
from glocal.patterns.axis import AxisWindow, Border, Oversize
from glocal.patterns.base import Pattern, Term

T = TypeVar("T", int, bool, str)


@dataclass(frozen=True)
class Neighborhood(Pattern):
    """Every query sees the window of keys around it, along every axis of its grid.

    window, stride, dilation, causal, border, oversize: one value for all axes or one an axis.
    stride: so many neighbouring queries share the window of their leader (1: every query its own).
    dilation: only every so many-th token is seen; the window is counted in those.
    border: "shift" moves windows inwards so that each query sees the whole window, "clip" cuts them off.
    oversize: a window (times dilation) longer than its axis is an "error", or "full" sees the whole axis
        (of its dilation group).
    Extra keys that every query sees are a flat part of the key canvas (policy "all").
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    border: Border | tuple[Border, ...] = "shift"
    oversize: Oversize | tuple[Oversize, ...] = "error"

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation", "causal", "border", "oversize"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        ranks = {len(v) for v in vars(self).values() if isinstance(v, tuple)}
        if len(ranks) > 1:
            raise ValueError(f"Neighborhood: per-axis arguments have different lengths {sorted(ranks)}.")
        rank = ranks.pop() if ranks else 1
        legal = {"border": ("shift", "clip"), "oversize": ("error", "full")}
        for name, words in legal.items():
            for word in per_axis(getattr(self, name), rank):
                if word not in words:
                    raise ValueError(f"Neighborhood: {name}={word!r}; legal: {', '.join(map(repr, words))}.")
        for name in ("window", "stride", "dilation"):
            for size in per_axis(getattr(self, name), rank):
                if not isinstance(size, Integral):
                    raise TypeError(f"Neighborhood: {name}={getattr(self, name)!r} must be whole numbers, one an axis.")
        axes = zip(*(per_axis(v, rank) for v in (self.window, self.stride, self.dilation)), strict=True)
        for axis, (window, stride, dilation) in enumerate(axes):
            if window < 1 or dilation < 1:
                raise ValueError(
                    f"Neighborhood: window={window} and dilation={dilation} on axis {axis} must be at least 1."
                )
            if not 1 <= stride <= window:
                raise ValueError(
                    f"Neighborhood: stride={stride} on axis {axis} must lie between 1 and the window {window}; "
                    f"nearest legal stride: {min(max(stride, 1), window)}."
                )

    def check(self, layout: Layout) -> None:
        for name in {p.name for p in layout.q.grids} & {p.name for p in layout.kv.grids}:
            q, k = (side.parts[side.number(name)].axes for side in (layout.q, layout.kv))
            if q != k:
                raise ValueError(f"Neighborhood: grid {name!r} has axes {q} for queries but {k} for keys.")
            self.axes(k)

    def axes(self, shape: Sequence[int]) -> tuple[AxisWindow, ...]:
        """The window of every axis of a grid; ValueError where it does not fit."""
        rank = len(shape)
        fields = [
            per_axis(v, rank, "Neighborhood", n)
            for n, v in vars(self).items()
            if n in ("window", "stride", "dilation", "causal", "border", "oversize")
        ]
        axes = []
        for axis, (length, window, stride, dilation, causal, border, oversize) in enumerate(
            zip(shape, *fields, strict=True)
        ):
            if window * dilation > length:
                if oversize == "error":
                    fits = max(length // dilation, 1)
                    raise ValueError(
                        f"Neighborhood: window={window} with dilation={dilation} does not fit axis {axis} of length "
                        f"{length} in {tuple(shape)}; largest window there: {fits}, largest dilation: "
                        f"{max(length // window, 1)}. oversize='full' lets it see the whole axis."
                    )
                window, border = -(-length // dilation), "shift"
            axes.append(AxisWindow(window, min(stride, window), dilation, causal, border))
        return tuple(axes)

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        seen = torch.ones_like(q.index == k.index)
        for axis, (rule, length) in enumerate(zip(self.axes(shape), shape, strict=True)):
            seen = seen & rule.sees(q.axes[axis], k.axes[axis], length)
        return seen

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        return [self.axes(shape)]


def per_axis(value: T | tuple[T, ...], rank: int, owner: str = "Neighborhood", name: str = "window") -> tuple[T, ...]:
    """One value for every axis; ValueError if a tuple has another length."""
    if not isinstance(value, tuple):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(f"{owner}: {name}={value!r} has {len(value)} entries, but the grid has {rank} axes.")
    return value
