"""Channel group attention (DaViT, arXiv 2204.03645), in its released form and in that of Florence-2 (arXiv 2311.06242).

Each channel is a token whose feature is the whole map. The released form takes k as query, v as key and q as value and
scales by (channels of a group) ** -0.5; the second form has the usual roles and the scale tokens ** -0.5. Weights of
one load into the other without an error and give other results.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from glocal.nn._heads import check_heads
from glocal.ops.channel import gram

ChannelForm = Literal["v1", "v2"]


class ChannelAttention(nn.Module):
    """x: [B, *map, dim]; keys `qkv`, `proj`. Every size runs; cost is linear in the tokens.

    heads: groups of channels. form: "v1" as released with DaViT-T/S/B, "v2" as in Florence-2. dynamic_scale: False
    gives "v2" the scale of "v1". No map may be padded before it: padding tokens would count.
    """

    def __init__(
        self, dim: int, heads: int, form: ChannelForm = "v1", qkv_bias: bool = True, dynamic_scale: bool = True
    ) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        if form not in get_args(ChannelForm):
            raise ValueError(f"ChannelAttention: form={form!r}; legal: 'v1', 'v2'.")
        if form == "v1" and not dynamic_scale:
            raise ValueError("ChannelAttention: dynamic_scale=False with form='v1', whose scale is fixed; legal: True.")
        self.dim, self.heads, self.form, self.dynamic_scale = dim, heads, form, dynamic_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, *map, dim] -> the same shape; `stage` is unused."""
        tokens = x.flatten(1, -2)  # [B, N, dim]
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        scale = (self.dim // self.heads) ** -0.5
        if self.form == "v1":
            out = gram(k, v, q, self.heads, scale=scale)
        else:
            out = gram(q, k, v, self.heads, scale=tokens.shape[1] ** -0.5 if self.dynamic_scale else scale)
        return self.proj(out).reshape(x.shape)

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        return f"dim={self.dim}, heads={self.heads}, form={self.form!r}"
