"""Maps cut into windows (Swin, arXiv 2103.14030) and into grids of distant tokens (MaxViT, arXiv 2204.01697).

Groups come image by image, row by row; tokens inside a group row by row. Sides must divide the map: pad it first.
"""

from __future__ import annotations

import torch
from torch import Tensor

Sides = tuple[int, int]


def to_windows(x: Tensor, window: Sides) -> Tensor:
    """x: [B, H, W, C] -> [B, windows, h * w, C], contiguous windows of h x w tokens."""
    _divides("to_windows", x, window)
    b, height, width, c = x.shape
    h, w = window
    x = x.reshape(b, height // h, h, width // w, w, c).transpose(2, 3)  # [B, rows, columns, h, w, C]
    return x.reshape(b, (height // h) * (width // w), h * w, c)


def from_windows(t: Tensor, size: Sides, window: Sides) -> Tensor:
    """The inverse of `to_windows`: t: [B, windows, h * w, C] -> [B, *size, C]."""
    (height, width), (h, w) = size, window
    t = t.reshape(t.shape[0], height // h, width // w, h, w, t.shape[-1]).transpose(2, 3)
    return t.reshape(t.shape[0], height, width, t.shape[-1])


def to_grid(x: Tensor, grid: Sides) -> Tensor:
    """x: [B, H, W, C] -> [B, groups, g * h, C]: group (a, b) holds the tokens (i H / g + a, j W / h + b)."""
    _divides("to_grid", x, grid)
    b, height, width, c = x.shape
    g, h = grid
    x = x.reshape(b, g, height // g, h, width // h, c).permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, g, h, C]
    return x.reshape(b, (height // g) * (width // h), g * h, c)


def from_grid(t: Tensor, size: Sides, grid: Sides) -> Tensor:
    """The inverse of `to_grid`: t: [B, groups, g * h, C] -> [B, *size, C]."""
    (height, width), (g, h) = size, grid
    t = t.reshape(t.shape[0], height // g, width // h, g, h, t.shape[-1]).permute(0, 3, 1, 4, 2, 5)
    return t.reshape(t.shape[0], height, width, t.shape[-1])


def rolled_visible(size: Sides, window: Sides, shift: Sides, device: torch.device | str = "cpu") -> Tensor:
    """Who sees whom in the windows of a map that was rolled by -shift: bool [windows, N, N].

    Tokens of one window that come from opposite borders of the map do not see each other.
    """
    axes = []
    for length, side, moved in zip(size, window, shift, strict=True):
        place = torch.arange(length, device=device)
        axes.append((place >= length - side).int() + (place >= length - moved).int() * (moved > 0))
    regions = axes[0][:, None] * 3 + axes[1]  # [H, W]
    groups = to_windows(regions[None, :, :, None], window)[0, :, :, 0]  # [windows, N]
    return groups[:, :, None] == groups[:, None]


def _divides(call: str, x: Tensor, sides: Sides) -> None:
    if x.shape[1] % sides[0] or x.shape[2] % sides[1]:
        padded = tuple(-(-length // side) * side for length, side in zip(x.shape[1:3], sides, strict=True))
        raise ValueError(
            f"{call}: sides {sides} do not divide the map {tuple(x.shape[1:3])}; pad it to {padded} (blocks.pad_to)."
        )
