"""Sparse global attention: equally spaced tokens (MaxViT, arXiv 2204.01697) and whole axes (arXiv 1912.12180)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glocal.patterns.base import Everything, Term
from glocal.patterns.neighborhood import per_axis
from glocal.patterns.relations import SAME, Products, Residue


@dataclass(frozen=True)
class Grid(Products):
    """Tokens at equal distances see each other; one value for all axes or one an axis.

    size: tokens of a group along the axis (MaxViT's G); their distance is ceil(length / size), so that groups are
        ragged where it does not divide.
    stride: the distance itself instead.
    """

    size: int | tuple[int, ...] | None = None
    stride: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            least = min(value) if isinstance(value, (tuple, list)) else value
            if least is not None and least < 1:
                raise ValueError(f"Grid: {name}={value!r} must be at least 1 on every axis.")
        if (self.size is None) == (self.stride is None):
            raise ValueError(
                f"Grid: size={self.size!r} and stride={self.stride!r}; give exactly one, such as size=7 or stride=8."
            )

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        if self.stride is not None:
            strides = per_axis(self.stride, len(shape), "Grid", "stride")
        else:
            assert self.size is not None
            sizes = per_axis(self.size, len(shape), "Grid", "size")
            strides = tuple(max(-(-n // g), 1) for n, g in zip(shape, sizes, strict=True))
        return [tuple(Residue(step) for step in strides)]


@dataclass(frozen=True)
class Axial(Products):
    """Tokens that differ along `axes` only see each other (negative axes count from the last).

    ``Axial(0) | Axial(1)`` is the cross of a 2-D grid; ``Axial((1, 2))`` is every frame of a video by itself.
    """

    axes: int | tuple[int, ...]

    def __post_init__(self) -> None:
        axes = (self.axes,) if isinstance(self.axes, int) else tuple(self.axes)
        object.__setattr__(self, "axes", axes)
        if not axes:
            raise ValueError("Axial: axes=() names no axis; give at least one, such as axes=(0,).")

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        assert isinstance(self.axes, tuple)
        rank = len(shape)
        for axis in self.axes:
            if not -rank <= axis < rank:
                raise ValueError(
                    f"Axial: axes={self.axes} names axis {axis}, but the grid {shape} has axes 0 to {rank - 1}."
                )
        free = {axis % rank for axis in self.axes}
        return [tuple(Everything() if axis in free else SAME for axis in range(rank))]
