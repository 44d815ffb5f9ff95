"""Linear attention of L2ViT (arXiv 2501.16182), and the convolutions that give it locality back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glocal.nn._heads import check_heads, split_heads
from glocal.nn.blocks.layout import conv
from glocal.ops.linear import Ratio, linear_attention


class EnhancedLinearAttention(nn.Module):
    """Global attention with ReLU features, x: [B, *map, dim]; keys `qkv`, `proj`, `temperature`.

    The row sum of the weights is limited from below by `floor` (100 as published: at few tokens or small activations
    it is active, and the layer is then not normalised). `temperature` multiplies the numerator, one for each head.
    Sums are taken in float32. Every size runs; token order does not matter.
    """

    def __init__(self, dim: int, heads: int, floor: float = 100.0, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        if floor <= 0:
            raise ValueError(f"EnhancedLinearAttention: floor={floor} must be positive; published: 100.")
        self.dim, self.heads, self.floor = dim, heads, floor
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), (dim // heads) ** -0.5))

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, *map, dim] -> the same shape; `stage` is unused."""
        q, k, v = self.projected(x)
        out = linear_attention(q, k, v, Ratio(self.floor, self.temperature.flatten()))
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k after their ReLU, and v, [B, heads, N, head size] each."""
        q, k, v = split_heads(self.qkv(x.flatten(1, -2)), 3, self.heads)
        return q.relu(), k.relu(), v

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        return f"dim={self.dim}, heads={self.heads}, floor={self.floor}"


class LocalConcentration(nn.Module):
    """Depthwise convolution, GELU, BatchNorm, depthwise convolution; keys `conv1`, `bn`, `conv2`. kernel: odd side."""

    def __init__(self, dim: int, kernel: int = 7) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"LocalConcentration: kernel={kernel} must be odd, for example {kernel + 1}.")
        self.conv1 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        return conv(self.conv2, conv(self.bn, self.act(conv(self.conv1, x))))
