"""Channels-last maps and convolutions: layers speak [B, H, W, C], torch's convolutions [B, C, H, W].

The change is a view: a channels-last tensor seen as [B, C, H, W] has torch's channels_last memory format, which its
convolutions keep.
"""

from __future__ import annotations

from math import ceil

import torch.nn.functional as F
from torch import Tensor, nn


def to_nchw(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], a view."""
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C], a view."""
    return x.permute(0, 2, 3, 1)


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a [B, C, H, W] layer to x: [B, H, W, C]."""
    return to_nhwc(layer(to_nchw(x)))


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zeros at the bottom and the right of x: [B, H, W, C] up to `height` x `width`."""
    below, right = height - x.shape[1], width - x.shape[2]
    return x if below == right == 0 else F.pad(x, (0, 0, 0, right, 0, below))


def pad_multiple(x: Tensor, multiple: int | tuple[int, int]) -> Tensor:
    """Zeros at the bottom and the right of x: [B, H, W, C] until `multiple` divides both sides."""
    down, across = (multiple, multiple) if isinstance(multiple, int) else multiple
    return pad_to(x, ceil(x.shape[1] / down) * down, ceil(x.shape[2] / across) * across)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of x: [B, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        """x: [B, C, H, W] -> the same shape."""
        return to_nchw(super().forward(to_nhwc(input)))
