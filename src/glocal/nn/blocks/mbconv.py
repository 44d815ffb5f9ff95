"""Inverted residual with squeeze and excitation, as MaxViT (arXiv 2204.01697) has it, and convolutions padded as there.

The input is normalised before the expansion, inner widths follow the output width, and the shortcut takes the input as
it came.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.kernels.maps import usable
from glocal.nn.blocks.drop_path import DropPath
from glocal.nn.blocks.layout import SameConv2d, conv, to_nchw, to_nhwc
from glocal.nn.blocks.squeeze import SqueezeExcite
from glocal.ops.depthwise import depthwise_conv
from glocal.ops.norm import stored_norm

tanh_gelu = partial(nn.GELU, approximate="tanh")
batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class Shortcut(nn.Module):
    """The mean of 2 x 2 pixels where `stride` is 2, then a 1 x 1 convolution `expand` where widths differ."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.expand = nn.Conv2d(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, ceil(H / stride), ceil(W / stride), out]; border cells are means of their pixels."""
        if self.stride == 1:
            return conv(self.expand, x)
        return to_nhwc(self.expand(F.avg_pool2d(to_nchw(x), 2, 2, ceil_mode=True, count_include_pad=False)))


class MBConv(nn.Module):
    """shortcut(x) + conv3_1x1(se(act(norm2(conv2_kxk(act(norm1(conv1_1x1(pre_norm(x)))))))))).

    dim, out: channels. stride: 1 or 2. expansion: inner over output channels. Keys are those of timm.
    """

    def __init__(self, dim: int, out: int, stride: int = 1, expansion: int = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"MBConv: stride={stride}; legal: 1, 2.")
        if out < 4:
            raise ValueError(f"MBConv: out={out} must be at least 4, its gate has a quarter of it.")
        inner = expansion * out
        self.shortcut = Shortcut(dim, out, stride)
        self.pre_norm = batch_norm(dim)
        self.conv1_1x1 = nn.Conv2d(dim, inner, 1, bias=False)
        self.norm1 = batch_norm(inner)
        self.conv2_kxk = SameConv2d(inner, inner, 3, stride, groups=inner, bias=False)
        self.norm2 = batch_norm(inner)
        self.act = tanh_gelu()
        self.se = SqueezeExcite(inner, out // 4, nn.SiLU, pointwise=True)
        self.conv3_1x1 = nn.Conv2d(inner, out, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, ceil(H / stride), ceil(W / stride), out]."""
        if self._fuses(x):
            y = conv(self.conv1_1x1, stored_norm(x, *_stats(self.pre_norm)))
            y = stored_norm(y, *_stats(self.norm1), "gelu_tanh")
            pads, stride = self.conv2_kxk.pads(*y.shape[1:3]), self.conv2_kxk.stride[0]
            kernel, norm = self.conv2_kxk.weight, _stats(self.norm2)
            y = depthwise_conv(y, kernel, stride=stride, padding=pads, norm=norm, act="gelu_tanh")
        else:
            y = self.act(conv(self.norm1, conv(self.conv1_1x1, conv(self.pre_norm, x))))
            y = self.act(conv(self.norm2, conv(self.conv2_kxk, y)))
        return self.shortcut(x) + self.drop_path(conv(self.conv3_1x1, self.se(y)))

    def _fuses(self, x: Tensor) -> bool:
        """Whether norms by stored statistics and activations are one pass here."""
        return not (self.training or torch.is_grad_enabled()) and usable(x, self.conv2_kxk.weight)


def _stats(norm: nn.BatchNorm2d) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], float]:
    """Mean, variance, weight and bias, and epsilon."""
    assert norm.running_mean is not None and norm.running_var is not None
    return (norm.running_mean, norm.running_var, norm.weight, norm.bias), norm.eps
