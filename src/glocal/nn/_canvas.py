"""Canvases of feature maps, made once a size, in a form that compiled graphs can read.

A layer learns the size of its map from the tensor, so it makes the canvas in its forward pass. A graph can neither
trace the making nor pass on an object without a place in the program; so it is kept as an attribute and read there.
"""

from __future__ import annotations

from functools import lru_cache
from operator import index

import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.kernels import windows
from glocal.patterns.base import Pattern
from glocal.plan.windows import window_keys


class _Known:
    """One attribute a size: a compiled graph then guards on the sizes it uses, not on all."""


_KNOWN = _Known()


@torch.compiler.assume_constant_result
def _name(*shape: int) -> str:
    """Name of the canvas of `shape`, which exists from then on."""
    name = "x".join(map(str, shape))
    if not hasattr(_KNOWN, name):
        canvas = Canvas(shape)
        canvas.coords()  # fills what a graph may read but not fill
        setattr(_KNOWN, name, canvas)
    return name


def small_windows(x: Tensor, head_size: int, pattern: Pattern, dropout: float) -> bool:
    """Whether the kernels of small windows take attention over `pattern` on the map x: [B, *map, C], here and now."""
    able = windows.CAPABILITY
    if able.by_name_only is not None:
        return False
    if not x.is_cuda or x.dtype not in able.dtypes or dropout > 0 or windows.missing("cuda") is not None:
        return False
    if 0 in x.shape or not able.head_dims.allows(head_size):
        return False
    return _fits(pattern, head_size, *map(index, x.shape[1:-1]))


@torch.compiler.assume_constant_result
def _fits(pattern: Pattern, head_size: int, *shape: int) -> bool:
    keys, most = _keys(pattern, shape), windows.CAPABILITY.keys_held(head_size)
    return keys is not None and (most is None or keys <= most)


@lru_cache(maxsize=256)
def _keys(pattern: Pattern, shape: tuple[int, ...]) -> int | None:
    return window_keys(pattern, Canvas(shape))


def canvas_of(*shape: int) -> Canvas:
    """The canvas of a map of `shape` tokens per axis; compiled graphs are specialised to it."""
    return getattr(_KNOWN, _name(*map(index, shape)))  # index() makes a symbolic size a number
