"""The two attentions of DuoFormer (arXiv 2506.12982): over scales inside regions, then among regions.

An image is cut into regions; each owns the tokens that lie in it on every scale of a pyramid, 1 + 4 + 16 + 64 of them
for four scales. Attention inside regions relates scales, attention of one token a region relates places. Both are
dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn._groups import attend_groups
from glocal.nn._heads import check_heads, check_map, split_heads
from glocal.nn.blocks.layout import pad_multiple, to_nchw, to_nhwc
from glocal.nn.blocks.windows import from_windows, to_windows
from glocal.nn.mixer import register_mixer


def region_tokens(maps: Sequence[Tensor]) -> Tensor:
    """The tokens of each region, coarse scales first.

    maps: the k-th is [B, 2**k h, 2**k w, C], so the first has one cell a region. Cells of a region come row by row, of
    the second map column by column: learned positions are stored in this order.

    Returns [B, h * w, 1 + 4 + 16 + ..., C]. Raises ValueError for maps whose sides do not double.
    """
    height, width = maps[0].shape[1:3]
    parts = []
    for k, cells in enumerate(maps):
        side = 2**k
        if tuple(cells.shape[1:3]) != (side * height, side * width):
            raise ValueError(
                f"region_tokens: maps[{k}] has sides {tuple(cells.shape[1:3])}; with maps[0] of {(height, width)} they "
                f"must be {(side * height, side * width)}."
            )
        tokens = to_windows(cells, (side, side))  # [B, h * w, 4**k, C]
        parts.append(tokens[:, :, [0, 2, 1, 3]] if k == 1 else tokens)
    return torch.cat(parts, 2)


class GroupAttention(nn.Module):
    """Multi-head attention inside groups of tokens, x: [B, groups, N, dim]; keys `qkv`, `proj`.

    scale: of the logits, None is head size ** -0.5. attn_drop, proj_drop: dropout in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        scale: float | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        self.dim, self.heads, self.scale, self.attn_drop = dim, heads, scale, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, asking: slice = slice(None)) -> Tensor:
        """x: [B, groups, N, dim] -> [B, groups, M, dim], the results of the tokens `asking`."""
        dropout = self.attn_drop if self.training else 0.0
        return self.proj_drop(group_attention(x, (self.qkv, self.proj), self.heads, self.scale, asking, dropout))


def group_attention(
    x: Tensor,
    layers: tuple[nn.Linear, nn.Linear],
    heads: int,
    scale: float | None = None,
    asking: slice = slice(None),
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside groups with the layers (qkv, proj); shapes as in `GroupAttention`."""
    qkv, proj = layers
    b, groups, n, dim = x.shape
    ask = x[:, :, asking]  # [B, groups, M, dim]
    m = ask.shape[2]
    if m == n:
        q, k, v = split_heads(qkv(x).flatten(0, 1), 3, heads)  # [B * groups, heads, N, head size]
    else:
        bias = (None, None) if qkv.bias is None else (qkv.bias[:dim], qkv.bias[dim:])
        q = F.linear(ask, qkv.weight[:dim], bias[0]).reshape(b * groups, m, heads, dim // heads).transpose(1, 2)
        k, v = split_heads(F.linear(x, qkv.weight[dim:], bias[1]).flatten(0, 1), 2, heads)
    out = attend_groups(q, k, v, dropout=dropout, scale=scale)
    return proj(out.transpose(1, 2).reshape(b, groups, m, dim))


class TwofoldAttention(GroupAttention):
    """Two attentions in one layer (arXiv 2407.13920), logits scaled by 2 * dim ** -0.5.

    Inside groups with `qkv1`, `proj1`: the call. Among regions with `qkv`, `proj`: `among`.
    """

    def __init__(
        self, dim: int, heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, heads, 2 * dim**-0.5, qkv_bias, attn_drop, proj_drop)
        self.qkv1 = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj1 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, asking: slice = slice(None)) -> Tensor:
        """x: [B, groups, N, dim] -> [B, groups, M, dim], the results of the tokens `asking`."""
        dropout = self.attn_drop if self.training else 0.0
        return self.proj_drop(group_attention(x, (self.qkv1, self.proj1), self.heads, self.scale, asking, dropout))

    def among(self, x: Tensor, asking: slice = slice(None)) -> Tensor:
        """The same with the other weights."""
        return super().forward(x, asking)


class ScaleMixer(nn.Module):
    """Tokens of a map ask their region on all scales, x: [B, H, W, dim].

    scales: how many; regions have 2 ** (scales - 1) tokens a side. The coarser scales are means of the map that enters
    the stage (`begin`). Maps are padded with zeros at the bottom and the right to whole regions; the padding is
    ordinary tokens.
    """

    def __init__(self, dim: int, heads: int, scales: int = 3) -> None:
        super().__init__()
        if scales < 1:
            raise ValueError(f"ScaleMixer: scales={scales} must be at least 1.")
        self.scales, self.side = scales, 2 ** (scales - 1)
        self.attn = GroupAttention(dim, heads)

    def begin(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim], the entrance of the stage -> the coarse tokens of each region, [B, regions, T, dim]."""
        x = to_nchw(pad_multiple(x, self.side))
        coarse = [to_nhwc(F.avg_pool2d(x, self.side >> k)) for k in range(self.scales - 1)]
        if coarse:
            return region_tokens(coarse)
        return x.new_zeros(x.shape[0], x.shape[2] * x.shape[3], 0, x.shape[1])

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim], stage: of `begin` -> the same shape. Raises ValueError for another `stage`."""
        check_map(self, x, self.attn.dim)
        height, width = x.shape[1:3]
        x = pad_multiple(x, self.side)
        tokens = to_windows(x, (self.side, self.side))  # [B, regions, side ** 2, dim]
        wanted = (*tokens.shape[:2], sum(4**k for k in range(self.scales - 1)), x.shape[-1])
        if not isinstance(stage, Tensor) or tuple(stage.shape) != wanted:
            found = f"a tensor of shape {tuple(stage.shape)}" if isinstance(stage, Tensor) else repr(stage)
            raise ValueError(
                f"ScaleMixer: stage={found} must be the coarse tokens of the regions, of shape {wanted}; "
                f"make them once a stage: stage = begin(mixers, x)."
            )
        out = self.attn(torch.cat((stage, tokens), 2), slice(wanted[2], None))
        return from_windows(out, (x.shape[1], x.shape[2]), (self.side, self.side))[:, :height, :width]


class PatchMixer(nn.Module):
    """Means of regions attend to each other, and each token gets what its region got, x: [B, H, W, dim].

    side: tokens of a region a side; regions at the lower and right border may be smaller.
    """

    def __init__(self, dim: int, heads: int, side: int = 4) -> None:
        super().__init__()
        if side < 1:
            raise ValueError(f"PatchMixer: side={side} must be at least 1.")
        self.side = side
        self.attn = GroupAttention(dim, heads)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        height, width = x.shape[1:3]
        means = to_nhwc(F.avg_pool2d(to_nchw(x), self.side, ceil_mode=True, count_include_pad=False))
        out = self.attn(means.flatten(1, 2)[:, None]).reshape(means.shape)
        out = out.repeat_interleave(self.side, 1).repeat_interleave(self.side, 2)
        return out[:, :height, :width]


@register_mixer("duoformer")
def duo_attention(dim: int, heads: int, block: int = 0, scales: int = 3) -> ScaleMixer | PatchMixer:
    """Attention of one block, x: [B, H, W, dim]: over scales inside regions in even blocks, among regions in odd ones.

    scales: as in `ScaleMixer`.
    """
    return PatchMixer(dim, heads, 2 ** (scales - 1)) if block % 2 else ScaleMixer(dim, heads, scales)
