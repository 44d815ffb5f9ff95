"""HiLo attention (LITv2, arXiv 2205.13213): some heads look inside tiny windows, the others at the averaged map.

Hi-Fi heads attend inside windows of s x s tokens. Lo-Fi heads attend from every token to the means of all windows. The
outputs lie side by side, Hi-Fi first; nothing mixes the two groups. No masks, shifts or tables.

Maps that s does not divide are padded with zeros at the bottom and the right, as in the authors' dense-prediction code:
padding is an ordinary key of Hi-Fi windows and counts in the means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn._groups import attend_groups
from glocal.nn._heads import check_heads, split_heads
from glocal.nn.blocks.layout import pad_multiple, to_nchw, to_nhwc
from glocal.nn.blocks.windows import from_windows, to_windows
from glocal.nn.mixer import register_mixer


@register_mixer("hilo")
class HiLo(nn.Module):
    """Attention over x: [B, H, W, dim]; keys `h_qkv`, `h_proj`, `l_q`, `l_kv`, `l_proj`, of the groups that have heads.

    window: s; 1 makes all heads Lo-Fi, which is then dense attention. alpha: share of the Lo-Fi heads, rounded down to
    whole heads; 0 leaves Hi-Fi alone, 1 Lo-Fi alone. scale: of the logits, None is head size ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int = 2,
        alpha: float = 0.9,
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        if window < 1:
            raise ValueError(f"HiLo: window={window} must be at least 1.")
        if not 0 <= alpha <= 1:
            raise ValueError(f"HiLo: alpha={alpha} must lie in [0, 1]; published models have 0.9.")
        self.dim, self.heads, self.window, self.alpha, self.scale = dim, heads, window, alpha, scale
        self.head_size = dim // heads
        self.low_heads = heads if window == 1 else int(heads * alpha)
        self.high_heads = heads - self.low_heads
        low, high = self.low_heads * self.head_size, self.high_heads * self.head_size
        if low:
            self.l_q = nn.Linear(dim, low, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * low, bias=qkv_bias)
            self.l_proj = nn.Linear(low, low)
        if high:
            self.h_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias)
            self.h_proj = nn.Linear(high, high)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        padded = pad_multiple(x, self.window)
        parts = []
        if self.high_heads:
            parts.append(self._high(x, padded))
        if self.low_heads:
            parts.append(self._low(x, padded))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def _high(self, x: Tensor, padded: Tensor) -> Tensor:
        """Inside windows, [B, H, W, high heads * head size]."""
        sides = (self.window, self.window)
        qkv = to_windows(self.h_qkv(padded), sides)  # [B, windows, N, 3 C]; few channels are cut, not all
        b, windows = qkv.shape[:2]
        q, k, v = split_heads(qkv.flatten(0, 1), 3, self.high_heads)  # [B * windows, heads, N, head size]
        out = attend_groups(q, k, v, scale=self.scale).transpose(1, 2).flatten(2).unflatten(0, (b, windows))
        size = (padded.shape[1], padded.shape[2])
        return self.h_proj(from_windows(out, size, sides)[:, : x.shape[1], : x.shape[2]])

    def _low(self, x: Tensor, padded: Tensor) -> Tensor:
        """From every token to the means of windows, [B, H, W, low heads * head size]."""
        means = padded if self.window == 1 else to_nhwc(F.avg_pool2d(to_nchw(padded), self.window))
        q = self._split(self.l_q(x))
        k, v = (self._split(each) for each in self.l_kv(means).chunk(2, -1))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # [B, heads, H W, head size]
        return self.l_proj(out.transpose(1, 2).reshape(*x.shape[:3], self.l_q.out_features))

    def _split(self, x: Tensor) -> Tensor:
        """[B, h, w, heads * head size] -> [B, heads, h w, head size]."""
        return x.flatten(1, 2).unflatten(-1, (self.low_heads, self.head_size)).transpose(1, 2)

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        groups = f"high_heads={self.high_heads}, low_heads={self.low_heads}"
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, {groups}"
