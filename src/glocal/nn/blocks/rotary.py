"""Rotary positions of pooled cells: those of their centres, taken from the table of the tokens.

A cell that keeps the coordinates of its centre keeps its distances to all others (UltraGen, arXiv 2510.18775). The
centre lies between tokens, so its angle is that of the first token of the cell and a half turn per token on top; how
fast each channel turns along an axis is read from the table, whatever base or split over axes the host has.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, [N, channels] each, tokens in raster order."""


def cell_centres(rotary: Rotary, axes: Sequence[int], stride: Sequence[int]) -> Rotary:
    """The table of cells of `stride` tokens an axis, the last ones maybe beyond the end: [M, channels] each.

    rotary: table of the tokens, angles of which grow evenly by less than half a turn a token along each axis. axes:
    tokens. A cell i of stride k lies at k i + (k - 1) / 2. Raises ValueError for a table of another size.
    """
    if rotary[0].shape[0] != prod(axes):
        raise ValueError(
            f"cell_centres: a table of {rotary[0].shape[0]} tokens fills no grid of {tuple(axes)}; legal: {prod(axes)}."
        )
    cos, sin = (t.to(torch.promote_types(t.dtype, torch.float32)).unflatten(0, tuple(axes)) for t in rotary)
    at = tuple(slice(None, None, k) for k in stride)
    first = (0,) * len(at)
    turn = torch.zeros_like(cos[first])  # of the centre beyond the first token of a cell, by channel
    for axis, k in enumerate(stride):
        if axes[axis] > 1 and k > 1:
            after = tuple(int(a == axis) for a in range(len(at)))
            c, s = cos[first] * cos[after] + sin[first] * sin[after], cos[first] * sin[after] - sin[first] * cos[after]
            turn = turn + torch.atan2(s, c) * ((k - 1) / 2)
    cos, sin = cos[at], sin[at]
    c, s = turn.cos(), turn.sin()
    kind = rotary[0].dtype
    return (cos * c - sin * s).flatten(0, -2).to(kind), (sin * c + cos * s).flatten(0, -2).to(kind)
