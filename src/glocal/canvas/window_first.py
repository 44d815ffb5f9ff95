"""Window-first orders: all tokens of one window before the next one, so that local attention touches few blocks.

The orders of Scale-DiT (arXiv 2510.16325): windows in raster order; inside a window raster, its 4 x 4 sub-windows one
after another, or the curve its authors call Hilbert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Inside = Literal["raster", "quarters", "hilbert"]


def window_first(shape: tuple[int, int], window: tuple[int, int], inside: Inside = "raster") -> Tensor:
    """Raster indices of a grid in window-first order, int64 [rows * columns].

    shape, window: rows and columns in tokens. inside: order of the tokens of a window.
    Raises ValueError if the window does not divide the grid, or for "quarters" if 4 does not divide the window.
    """
    for length, size in zip(shape, window, strict=True):
        if size < 1 or length % size:
            legal = [n for n in range(1, length + 1) if length % n == 0]
            raise ValueError(
                f"window_first: window={window} does not divide shape={shape}; nearest window of {length} tokens: "
                f"{min(legal, key=lambda n: abs(n - size))}."
            )
    (rows, columns), (tall, wide) = shape, window
    grid = torch.arange(rows * columns).reshape(rows // tall, tall, columns // wide, wide)
    windows = grid.permute(0, 2, 1, 3).reshape(-1, tall * wide)  # [windows, tokens]
    if inside == "raster":
        return windows.flatten()
    if inside == "quarters":
        if tall % 4 or wide % 4:
            raise ValueError(f"window_first: inside='quarters' needs a window of multiples of 4; window={window}.")
        return windows[:, window_first(window, (tall // 4, wide // 4))].flatten()
    if inside == "hilbert":
        return windows[:, turned_squares(window).argsort()].flatten()
    raise ValueError(f"window_first: inside={inside!r}; legal: 'raster', 'quarters', 'hilbert'.")


def turned_squares(shape: tuple[int, int]) -> Tensor:
    """Place of every raster token on the published curve of the least power-of-two square that holds `shape`.

    Places repeat never but may leave gaps. The curve turns its quarters as Hilbert's does but visits them in the order
    upper left, lower right, upper right, lower left: it jumps, and `glocal.canvas.curves.hilbert` does not.
    """
    side = 1 << (max(shape) - 1).bit_length()
    row = torch.arange(shape[0])[:, None].expand(shape).flatten()
    column = torch.arange(shape[1]).expand(shape).flatten()
    place = torch.zeros_like(row)
    half = side // 2
    while half:
        down, right = row >= half, column >= half
        place += half * half * ((3 * down.long()) ^ (2 * right.long()))
        row, column = row % half, column % half
        flip = down & ~right
        row, column = torch.where(flip, half - 1 - row, row), torch.where(flip, half - 1 - column, column)
        row, column = torch.where(right, row, column), torch.where(right, column, row)
        half //= 2
    return place


def inverse(order: Tensor) -> Tensor:
    """Where each token went: ``order[inverse(order)]`` counts up."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return back
