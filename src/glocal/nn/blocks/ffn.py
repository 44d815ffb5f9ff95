"""Feed-forward networks of a block: a plain one, and one with a depthwise convolution between its layers.

Keys are the usual ones: `fc1`, `fc2`, and `dwconv.dwconv` for the convolution (PVT v2, arXiv 2106.13797).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glocal.kernels.maps import usable
from glocal.nn.blocks.layout import conv


class Mlp(nn.Module):
    """fc1 -> activation -> dropout -> fc2 -> dropout over the last axis.

    dim, hidden: channels outside and inside. act: makes the activation.
    """

    def __init__(self, dim: int, hidden: int, act: Callable[[], nn.Module] = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] -> the same shape."""
        return self.drop(self.fc2(self.drop(self._hidden(x))))

    def _hidden(self, x: Tensor) -> Tensor:
        """act(fc1(x)); the tanh form of GELU in the same kernel as the product, where a GPU has one and none learns."""
        fused = isinstance(self.act, nn.GELU) and self.act.approximate == "tanh" and not torch.is_grad_enabled()
        if fused and x.is_cuda and usable(x, self.fc1.weight, self.fc1.bias):
            rows = torch._addmm_activation(self.fc1.bias, x.flatten(0, -2), self.fc1.weight.T, use_gelu=True)
            return rows.unflatten(0, x.shape[:-1])
        return self.act(self.fc1(x))


class DepthwiseConv(nn.Module):
    """A 3 x 3 depthwise convolution of a channels-last map, under the key `dwconv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        return conv(self.dwconv, x)

    def added(self, x: Tensor) -> Tensor:
        """x plus its convolution; on the CPU in the memory layout of the convolution, as published code adds them."""
        return conv(self.dwconv, x, residual=True) if x.is_cuda else self(x) + x


class ConvMlp(nn.Module):
    """fc1 -> depthwise convolution -> activation -> fc2 over a map.

    residual: the convolution is added to its input instead of replacing it (as in SG-Former and STViT). rectified: a
    ReLU comes before it (as in the linear form of PVT v2).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        act: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        residual: bool = False,
        rectified: bool = False,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.rectified = rectified
        self.dwconv = DepthwiseConv(hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        hidden = self.fc1(x).relu() if self.rectified else self.fc1(x)
        mixed = self.dwconv.added(hidden) if self.residual else self.dwconv(hidden)
        return self.drop(self.fc2(self.drop(self.act(mixed))))
