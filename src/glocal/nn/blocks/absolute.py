"""Learned position vectors, one a token: their sine-cosine start, and resizing them to another map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.nn.blocks.relative import Resize


def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """Sines and cosines of columns, then of rows (arXiv 2111.06377): [1, height * width, dim].

    The frequencies fall from 1 to 1e-4. Raises ValueError unless 4 divides dim.
    """
    if dim % 4:
        raise ValueError(f"sincos_positions: dim={dim} must be a multiple of 4; nearest: {max(4, round(dim / 4) * 4)}.")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim / 4))
    axes = []
    for length in (width, height):
        angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequency
        axes.append(torch.cat((angle.sin(), angle.cos()), 1))  # [length, dim / 2]
    columns, rows = axes[0][None].expand(height, -1, -1), axes[1][:, None].expand(-1, width, -1)
    return torch.cat((columns, rows), -1).reshape(1, height * width, dim).float()


def resize_positions(
    table: Tensor, side: int, size: tuple[int, int], extra: int = 0, mode: Resize = "bicubic"
) -> Tensor:
    """table: [1, extra + side * side, C] -> [1, extra + h * w, C] for a map of size (h, w).

    extra: vectors in front that belong to no place (class tokens); they stay.
    """
    if size == (side, side):
        return table
    grid = table[:, extra:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    places = F.interpolate(grid, size=size, mode=mode, align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat((table[:, :extra], places), 1)
