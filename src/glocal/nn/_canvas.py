"""Canvases of feature maps, made once a size, in a form that compiled graphs can read.

A layer learns the size of its map from the tensor, so it makes the canvas in its forward pass. A graph can neither
trace the making nor pass on an object without a place in the program; so it is kept as an attribute and read there.
"""

from __future__ import annotations

from operator import index

import torch

from glocal.canvas import Canvas


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


def canvas_of(*shape: int) -> Canvas:
    """The canvas of a map of `shape` tokens per axis; compiled graphs are specialised to it."""
    return getattr(_KNOWN, _name(*map(index, shape)))  # index() makes a symbolic size a number
