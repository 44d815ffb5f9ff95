"""Checks of canvases, windows and tiles: every message repeats the value, says what is legal and the nearest fix."""

from __future__ import annotations

import math
from collections.abc import Sequence

from glocal.patterns.axis import AxisWindow


def size_text(numbers: Sequence[int]) -> str:
    """Write (30, 48, 80) as 30x48x80."""
    return "x".join(str(n) for n in numbers)


def check_axes(canvas_shape: Sequence[int], axes: Sequence[AxisWindow]) -> None:
    """Raise ValueError unless every axis can hold its window; the message names the nearest legal value."""
    if not canvas_shape or min(canvas_shape) < 1:
        raise ValueError(f"canvas={size_text(canvas_shape)!r} needs at least one axis, each of at least 1 token")
    if len(axes) != len(canvas_shape):
        raise ValueError(
            f"{len(axes)} window axes for the canvas {size_text(canvas_shape)} of {len(canvas_shape)} axes; "
            f"give one window per axis"
        )
    for axis, (length, rule) in enumerate(zip(canvas_shape, axes, strict=True)):
        for name, value in (("window", rule.window), ("stride", rule.stride), ("dilation", rule.dilation)):
            if value < 1:
                raise ValueError(f"{name}={value} on axis {axis}; legal: at least 1; nearest: 1")
        if rule.stride > rule.window:
            raise ValueError(
                f"stride={rule.stride} is larger than window={rule.window} on axis {axis}; "
                f"legal: 1 to {rule.window}; nearest: {rule.window}"
            )
        if rule.border == "shift" and rule.window > length:
            raise ValueError(
                f"window={rule.window} is larger than axis {axis} of the canvas {size_text(canvas_shape)} "
                f"({length} tokens); legal: 1 to {length}; nearest: {length}"
            )
        if rule.border == "shift" and rule.window > math.ceil(length / rule.dilation):
            raise ValueError(
                f"dilation={rule.dilation} does not fit: window={rule.window} then spans "
                f"{rule.window * rule.dilation} tokens and axis {axis} of the canvas {size_text(canvas_shape)} has "
                f"{length}; legal: 1 to {length // rule.window}; nearest: {length // rule.window}"
            )
        if rule.dilation > length:
            raise ValueError(
                f"dilation={rule.dilation} is larger than axis {axis} of the canvas {size_text(canvas_shape)}; "
                f"legal: 1 to {length}; nearest: {length}"
            )


def check_tile(name: str, tile: Sequence[int], canvas_shape: Sequence[int]) -> None:
    """Raise ValueError unless the tile has one positive number per axis of the canvas."""
    rank = len(canvas_shape)
    if len(tile) != rank:
        nearest = ((1,) * rank + tuple(tile))[-rank:]
        raise ValueError(
            f"{name}={size_text(tile)} has {len(tile)} axes, the canvas {size_text(canvas_shape)} has {rank}; "
            f"legal: {rank} numbers; nearest: {size_text(nearest)}"
        )
    if min(tile) < 1:
        nearest = tuple(max(t, 1) for t in tile)
        raise ValueError(f"{name}={size_text(tile)}; legal: at least 1 per axis; nearest: {size_text(nearest)}")
