"""Deformable convolution (arXiv 1703.06211) with 2 x 2 taps of stride 2, and the token merging of LITv2 made of it.

Each tap reads the map at its place plus a learned offset, bilinearly, zero outside of the map. Plain PyTorch: all taps
are sampled, then multiplied by the weights as one matrix. `grid_sample` speaks of places in [-1, 1], which costs digits
of a place in a large map; on the CPU the four pixels around a place are read directly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn.blocks.layout import to_nchw, to_nhwc


class DeformableConv(nn.Conv2d):
    """A 2 x 2 convolution of stride 2 at places that `conv_offset` moves; an odd last row or column is left out.

    Offsets come as (down, right) of each tap, taps row by row. They start at zero: an ordinary convolution.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, 2, 2)
        self.conv_offset = nn.Conv2d(dim, 8, 2, 2)
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: Tensor) -> Tensor:
        """x: [B, C, H, W] -> [B, out, H // 2, W // 2]. Raises ValueError for sides below 2."""
        height, width = input.shape[2:]
        if min(height, width) < 2:
            raise ValueError(f"DeformableConv: a map of {height} x {width} has no 2 x 2 patch; give a larger image.")
        offset = self.conv_offset(input)  # [B, 8, h, w]
        taps = self._sampled(input, offset)  # [B, C, 4, h, w]
        b, c, _, h, w = taps.shape
        columns = taps.permute(0, 3, 4, 1, 2).reshape(b, h, w, 4 * c)
        return to_nchw(F.linear(columns, self.weight.reshape(self.out_channels, 4 * c), self.bias))

    def _sampled(self, x: Tensor, offset: Tensor) -> Tensor:
        """x: [B, C, H, W] at the taps moved by offset: [B, 8, h, w] -> [B, C, 4, h, w], in float32 at least."""
        height, width = x.shape[2:]
        b, _, h, w = offset.shape
        wide = x if x.dtype == torch.float64 else x.float()
        moved = offset.to(wide.dtype).unflatten(1, (2, 2, 2))  # [B, row and column of the tap, (down, right), h, w]
        tap, down, along = (torch.arange(n, dtype=wide.dtype, device=x.device) for n in (2, h, w))
        y = moved[:, :, :, 0] + (2 * down[:, None] + tap[:, None, None, None])
        right = moved[:, :, :, 1] + (2 * along + tap[:, None, None])  # [B, 2, 2, h, w]
        if x.device.type == "cpu":
            return (
                _bilinear(wide, y.reshape(b, 4 * h * w), right.reshape(b, 4 * h * w))
                .unflatten(2, (4, h, w))
                .to(x.dtype)
            )
        places = torch.stack(((2 * right + 1) / width - 1, (2 * y + 1) / height - 1), -1)
        grid = places.reshape(b, 4 * h, w, 2)
        return F.grid_sample(wide, grid, align_corners=False).unflatten(2, (4, h)).to(x.dtype)


def _bilinear(x: Tensor, y: Tensor, right: Tensor) -> Tensor:
    """x: [B, C, H, W] at rows y and columns `right`, both [B, P] -> [B, C, P]; zero outside of the map."""
    height, width = x.shape[2:]
    pixels = x.flatten(2)
    top, left = y.floor(), right.floor()
    below, beside = y - top, right - left
    out = torch.zeros((), dtype=x.dtype, device=x.device)
    for row, share_y in ((top, 1 - below), (top + 1, below)):
        for column, share_x in ((left, 1 - beside), (left + 1, beside)):
            inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            found = pixels.gather(2, index[:, None].expand(-1, x.shape[1], -1)) * inside[:, None]
            out = out + (share_y * share_x)[:, None] * found
    return out


class DeformableMerge(nn.Module):
    """Deformable convolution, batch norm, GELU: half the sides, rounded down; keys `dconv`, `norm_layer`."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.dconv = DeformableConv(dim, out)
        self.norm_layer = nn.BatchNorm2d(out)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, H // 2, W // 2, out]."""
        return to_nhwc(self.act(self.norm_layer(self.dconv(to_nchw(x)))))
