"""Attention to fewer keys: a map that a convolution made smaller (PVT, arXiv 2102.12122), or means of a fixed number of
cells (PVT v2's linear form, arXiv 2106.13797).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn._heads import check_heads
from glocal.nn.blocks.layout import conv, pad_to, to_nchw, to_nhwc
from glocal.nn.blocks.norm import LayerNorm
from glocal.nn.mixer import register_mixer


@register_mixer("pvt")
class SpatialReductionAttention(nn.Module):
    """Every token attends to a smaller map, x: [B, H, W, dim]; keys `q`, `kv`, `proj`; `sr`, `norm` of the reduction.

    reduction: side of the cells that a convolution turns into one key; 1 is dense attention, which also takes tokens
    [B, N, dim]. pool: the means of pool x pool cells instead, whatever the size of the map, and a GELU behind the norm.
    Rows and columns that do not fill a cell are no keys, as published; a map shorter than one cell is padded with zeros
    to it (a rule of ours).
    """

    def __init__(self, dim: int, heads: int, reduction: int = 1, pool: int | None = None) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        for name, value in (("reduction", reduction), ("pool", pool)):
            if value is not None and value < 1:
                raise ValueError(f"SpatialReductionAttention: {name}={value} must be at least 1.")
        self.heads, self.reduction, self.pool = heads, reduction if pool is None else 1, pool
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if self.reduction > 1 or pool is not None:
            self.sr = nn.Conv2d(dim, dim, self.reduction, self.reduction)
            self.norm = LayerNorm(dim)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        q = self._split(self.q(x))
        k, v = (self._split(t) for t in self.kv(self.reduced(x)).chunk(2, -1))
        out = F.scaled_dot_product_attention(q, k, v)  # [B, heads, tokens, head size]
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def reduced(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the map that keys and values are made from, [B, h, w, dim]."""
        if self.pool is not None:
            means = to_nhwc(F.adaptive_avg_pool2d(to_nchw(x), self.pool))
            return F.gelu(self.norm(conv(self.sr, means)))
        if self.reduction == 1:
            return x
        cell = self.reduction
        return self.norm(conv(self.sr, pad_to(x, max(x.shape[1], cell), max(x.shape[2], cell))))

    def _split(self, t: Tensor) -> Tensor:
        """[B, *map, dim] -> [B, heads, tokens, head size]."""
        return t.flatten(1, -2).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        return f"heads={self.heads}, reduction={self.reduction}, pool={self.pool}"
