"""Channels-last maps and convolutions: layers speak [B, H, W, C], torch's convolutions [B, C, H, W].

The change is a view: a channels-last tensor seen as [B, C, H, W] has torch's channels_last memory format, which its
convolutions keep.
"""

from __future__ import annotations

from math import ceil

import torch.nn.functional as F
from torch import Tensor, nn

from glocal.kernels.maps import autocasts, usable
from glocal.ops.depthwise import depthwise_conv
from glocal.ops.norm import layer_norm


def to_nchw(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], a view."""
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C], a view."""
    return x.permute(0, 2, 3, 1)


def conv(layer: nn.Module, x: Tensor, residual: bool = False) -> Tensor:
    """Apply a [B, C, H, W] layer to x: [B, H, W, C]; residual: add x."""
    if isinstance(layer, nn.Conv2d) and _depthwise(layer) and (usable(x, layer.weight) or autocasts(x)):
        pads = layer.pads(x.shape[1], x.shape[2]) if isinstance(layer, SameConv2d) else _pads(layer)
        stride = layer.stride[0]
        return depthwise_conv(x, layer.weight, layer.bias, stride=stride, padding=pads, residual=residual)
    if x.is_cuda and isinstance(layer, nn.Conv2d) and _pointwise(layer):
        out = F.linear(x, layer.weight.flatten(1), layer.bias)  # cuDNN adds a bias in a pass of its own
    else:
        out = to_nhwc(layer(to_nchw(x)))
    return x + out if residual else out


def _pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1 and layer.padding == (0, 0)


def _depthwise(layer: nn.Conv2d) -> bool:
    """Whether `glocal.ops.depthwise_conv` is what the layer does."""
    return (
        layer.groups == layer.in_channels == layer.out_channels
        and layer.kernel_size[0] == layer.kernel_size[1]
        and layer.stride[0] == layer.stride[1]
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _pads(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros at the top, bottom, left and right."""
    assert not isinstance(layer.padding, str)
    down, across = layer.padding
    return down, down, across, across


class SameConv2d(nn.Conv2d):
    """A convolution of x: [B, C, H, W] with as much padding as ceil(size / stride) outputs need.

    An odd pixel of padding lies at the bottom and the right, as in TensorFlow.
    """

    def forward(self, input: Tensor) -> Tensor:
        """x: [B, C, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        top, bottom, left, right = self.pads(*input.shape[2:])
        return super().forward(F.pad(input, (left, right, top, bottom)))

    def pads(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Zeros at the top, bottom, left and right of a map of that size."""
        found: list[int] = []
        for length, kernel, stride in zip((height, width), self.kernel_size, self.stride, strict=True):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            found += [total // 2, total - total // 2]
        return found[0], found[1], found[2], found[3]


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
        return to_nchw(layer_norm(to_nhwc(input), self.weight, self.bias, self.eps))
