"""Attention inside stripes of a map with locally-enhanced positions (CSWin, arXiv 2107.00652)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from glocal.nn._groups import attend_groups
from glocal.nn._heads import check_heads
from glocal.nn.blocks.layout import pad_to, to_nchw, to_nhwc
from glocal.nn.blocks.windows import from_windows, to_windows

Stripe = Literal["columns", "rows", "whole"]


class StripeBranch(nn.Module):
    """One branch of cross-shaped attention: q, k, v come from the block. Key `get_v`, a 3 x 3 convolution of the values
    that does not look over the border of a stripe.

    dim, heads: of this branch. stripe: "columns" (full height, `width` tokens wide), "rows", or "whole" for the map. A
    last stripe that the map does not fill is padded with zeros behind the projection; they have logit 0 and value 0
    and stay in the softmax (a rule of ours: published sizes need none).
    """

    def __init__(self, dim: int, heads: int, stripe: Stripe, width: int = 1) -> None:
        super().__init__()
        if stripe not in ("columns", "rows", "whole"):
            raise ValueError(f"StripeBranch: stripe={stripe!r}; legal: 'columns', 'rows', 'whole'.")
        check_heads("StripeBranch", dim, heads)
        self.heads, self.stripe, self.width = heads, stripe, width
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mean: Tensor) -> Tensor:
        """q, k, v: [B, H, W, dim] -> the same shape; `mean` is unused."""
        height, width = v.shape[1:3]
        sides = {"columns": (height, self.width), "rows": (self.width, width), "whole": (height, width)}[self.stripe]
        size = tuple(-(-length // side) * side for length, side in zip((height, width), sides, strict=True))
        full = (size[0], size[1])
        groups = [to_windows(pad_to(t, *full), sides).flatten(0, 1) for t in (q, k, v)]  # [B * stripes, N, dim]
        a, b, c = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in groups)
        out = attend_groups(a, b, c).transpose(1, 2).flatten(2)  # [B * stripes, N, dim]
        local = to_nhwc(self.get_v(to_nchw(groups[2].unflatten(1, sides)))).flatten(1, 2)
        stripes = full[0] * full[1] // (sides[0] * sides[1])
        whole = from_windows((out + local).unflatten(0, (v.shape[0], stripes)), full, sides)
        return whole[:, :height, :width]
