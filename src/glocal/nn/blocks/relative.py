"""Relative position tables: index, lookup, and resizing a trained table to another window.

Two layouts are in use. Swin's (arXiv 2103.14030): [(2h-1)(2w-1), heads], looked up by query minus key. The one of
neighbourhood attention and MaxViT: [heads, 2h-1, 2w-1], looked up by key minus query.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal._kept import ordinary

Resize = Literal["bicubic", "bilinear"]


@lru_cache(maxsize=64)
@ordinary()
def relative_index(height: int, width: int) -> Tensor:
    """Swin's index, int64 [hw, hw]: row (dy + h - 1)(2w - 1) + dx + w - 1 of the table, dy and dx query minus key."""
    rows, columns = torch.arange(height, device="cpu"), torch.arange(width, device="cpu")
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
    return (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1


def window_bias(table: Tensor, index: Tensor) -> Tensor:
    """table: [T, heads] in Swin's layout, index: int64 [N, N] -> bias [heads, N, N]."""
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)


def resize_table(table: Tensor, size: tuple[int, int], mode: Resize = "bicubic") -> Tensor:
    """table: [heads, a, b] -> [heads, *size], interpolated head by head between cell centres."""
    if tuple(table.shape[1:]) == size:
        return table
    return F.interpolate(table[None], size=size, mode=mode, align_corners=False)[0]


def resize_flat_table(table: Tensor, window: int, mode: Resize = "bicubic") -> Tensor:
    """A square table in Swin's layout, [(2v-1)**2, heads] -> [(2 window - 1)**2, heads]."""
    side = isqrt(table.shape[0])
    if side * side != table.shape[0]:
        raise ValueError(f"resize_flat_table: table of {table.shape[0]} rows is not square; nearest: {side * side}.")
    grid = table.T.reshape(-1, side, side)
    return resize_table(grid, (2 * window - 1, 2 * window - 1), mode).flatten(1).T
