"""Modified shifted window attention of HiDiffusion (arXiv 2311.17528): four windows, however large the map is.

The map is rolled by 0, 1, 2 or 3 quarters of a window and cut in two along each side. Nothing hides the seam of the
roll. A map with an odd side is resized (bicubic) to the next even one and back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.nn.blocks.windows import from_windows, to_windows


def shift_of(size: tuple[int, int], quarters: int) -> tuple[int, int]:
    """Rows and columns a map of size (height, width) is rolled by.

    As in the authors' code a map whose windows have fewer than four rows is not rolled at all.
    """
    rows, columns = (-(-side // 2) // 4 * quarters for side in size)
    return (rows, columns) if rows else (0, 0)


def window_attention(x: Tensor, size: tuple[int, int], attend: Callable[[Tensor], Tensor], quarters: int = 0) -> Tensor:
    """x [B, height * width, C] in raster order -> [B, height * width, C].

    attend: attention of each row of a batch [4 B, tokens of a window, C] -> the same shape. quarters: of a window, 0-3.
    Raises ValueError if x is no map of `size`, or quarters are not 0-3.
    """
    height, width = size
    if x.shape[1] != height * width:
        raise ValueError(f"window_attention: x has {x.shape[1]} tokens; legal: {height * width} for size={size}.")
    if not 0 <= quarters <= 3:
        raise ValueError(f"window_attention: quarters={quarters!r}; legal: 0, 1, 2, 3.")
    sides = (-(-height // 2), -(-width // 2))
    even = (2 * sides[0], 2 * sides[1])
    shift = shift_of(size, quarters)
    maps = _resized(x.unflatten(1, size), even)
    maps = torch.roll(maps, (-shift[0], -shift[1]), (1, 2))
    windows = to_windows(maps, sides)  # [B, 4, tokens, C]
    done = attend(windows.flatten(0, 1)).unflatten(0, (-1, 4))
    maps = torch.roll(from_windows(done, even, sides), shift, (1, 2))
    return _resized(maps, size).flatten(1, 2)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """maps [B, height, width, C] at another size; the same maps if they have it."""
    if tuple(maps.shape[1:3]) == size:
        return maps
    return F.interpolate(maps.permute(0, 3, 1, 2), size, mode="bicubic").permute(0, 2, 3, 1)
