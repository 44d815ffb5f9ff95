"""Bi-level routing attention (BiFormer, arXiv 2303.08810), both published operators.

A map is cut into regions. Mean queries and mean keys of the regions, all heads as one vector, decide which `top`
regions each region reads; its tokens then attend to the tokens of those regions alone. A depthwise convolution of the
values (LePE) is added. Keys are read in place through lists of blocks, so memory does not grow with `top`. Where copies
of all that is listed are small (32 MiB on a CPU, 1 GiB and regions of up to 64 tokens on a GPU) they are made: lists of
tiny blocks cost more.

Choices follow the content, so this part runs outside compiled graphs: `torch.compile` works without `fullgraph`.

Both operators scale logits by (width of all queries) ** -0.5, not by the head size. Neither masks padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal._kept import ordinary
from glocal.canvas import Canvas, Layout
from glocal.nn._groups import attend_groups
from glocal.nn._heads import check_heads, check_map
from glocal.nn.blocks.layout import conv, pad_multiple, pad_to, to_nchw, to_nhwc
from glocal.nn.blocks.windows import from_windows, to_windows
from glocal.ops import Score, attend, merge
from glocal.routing import BlockMean, Keep, Partition, RouteSpec, Selection, route
from glocal.routing.scorers import high

_COPIED = {"cpu": 1 << 25, "cuda": 1 << 30}  # bytes of keys and values that may be copied instead of read by lists
_SMALL = 64  # tokens of a region up to which a GPU copies: larger ones fill the blocks of its kernels

Pooling = Literal["none", "adaptive_mean", "adaptive_max", "mean", "max"]


@dataclass(frozen=True)
class RoutingSpec:
    """What is rarely changed.

    qk_dim: width of queries and keys; None is dim. scale: of routing and attention, None is qk_dim ** -0.5.
    lepe: side of the convolution over the values, 0 leaves it out. out_proj: False leaves the last projection out.
    pooling: fewer keys a region: to `pool` x `pool` tokens ("adaptive_mean", "adaptive_max"), or by windows of that
    side ("mean", "max"). soft: keys and values of a listed region are multiplied by its share of the softmax over the
    listed ones. differentiable: gradients flow through those shares into the routing; needs soft. block: tokens of the
    blocks that a region is cut into for the kernels; None is a whole region on the CPU and 16 to 128 elsewhere.
    """

    qk_dim: int | None = None
    scale: float | None = None
    lepe: int = 5
    out_proj: bool = True
    pooling: Pooling = "none"
    pool: int = 4
    soft: bool = False
    differentiable: bool = False
    block: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ValueError(
                f"RoutingSpec: pooling={self.pooling!r}; legal: {', '.join(map(repr, get_args(Pooling)))}."
            )
        for name in ("pool", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"RoutingSpec: {name}={value} must be at least 1.")
        if self.lepe < 0 or (self.lepe and self.lepe % 2 == 0):
            raise ValueError(f"RoutingSpec: lepe={self.lepe} must be odd or 0, for example {self.lepe + 1}.")
        if self.differentiable and not self.soft:
            raise ValueError("RoutingSpec: differentiable=True needs soft=True; hard choices have no gradient.")


@dataclass(frozen=True, eq=False)
class Routes:
    """What a layer chose for an input, best region first.

    index: int64 [B, regions, top] key regions of each query region, row by row over the map. weight: softmax over
    the scores of the listed regions, like index. attention: [B, heads, regions, tokens, top * keys] weights of the
    tokens of a region over the keys of its listed regions, side by side.
    """

    index: Tensor
    weight: Tensor
    attention: Tensor


@dataclass(frozen=True, eq=False)
class _Regions:
    """q: [B, S, n, Cq], k: [B, S, m, Cq], v: [B, S, m, C]: tokens by region. grid: regions a side. sides: tokens of
    a region. means: descriptors (q, k) [B, S, Cq].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int]
    sides: tuple[int, int]
    means: tuple[Tensor, Tensor]

    @property
    def size(self) -> tuple[int, int]:
        """Tokens a side of the padded map."""
        return self.grid[0] * self.sides[0], self.grid[1] * self.sides[1]


class _BiLevelRouting(nn.Module):
    """What both operators share: choosing regions and attending to them."""

    lepe: nn.Conv2d | None

    def __init__(self, dim: int, heads: int, regions: int, top: int, spec: RoutingSpec) -> None:
        super().__init__()
        self.qk_dim = dim if spec.qk_dim is None else spec.qk_dim
        check_heads(type(self).__name__, dim, heads)
        check_heads(type(self).__name__, self.qk_dim, heads)
        if regions < 1 or not 1 <= top <= regions**2:
            raise ValueError(
                f"{type(self).__name__}: top={top} must lie in [1, {max(regions, 0) ** 2}], the number of regions "
                f"(regions={regions} a side)."
            )
        self.dim, self.heads, self.regions, self.top, self.spec = dim, heads, regions, top, spec
        self.scale = self.qk_dim**-0.5 if spec.scale is None else spec.scale
        self.lepe = nn.Conv2d(dim, dim, spec.lepe, padding=spec.lepe // 2, groups=dim) if spec.lepe else None

    def routes(self, x: Tensor) -> Routes:
        """The regions that x: [B, H, W, dim] reads, and the attention inside them (gathered: for looking, not fast)."""
        parts = self._split(x)
        chosen, weight = self._chosen(parts)
        index = chosen[:, 0].long()  # [B, S, top]
        q, k = (t.unflatten(-1, (self.heads, -1)) for t in (parts.q, parts.k))  # [B, S, n, heads, d]
        keys = k[torch.arange(k.shape[0], device=k.device)[:, None, None], index]  # [B, S, top, m, heads, d]
        if self.spec.soft:
            keys = keys * weight[..., None, None, None]
        logits = torch.einsum("bsnhd,bstmhd->bhsntm", q * self.scale, keys)
        return Routes(index, weight, logits.flatten(-2).softmax(-1))

    def macs(self, x: Tensor) -> int:
        """Multiply-adds of the layer on x: [B, H, W, dim]."""
        height, width = x.shape[1:3]
        grid, sides = self._cut(height, width)
        regions, n = prod(grid), prod(sides)
        m = prod(_pooled_sides(sides, self.spec))
        projected = regions * n if self.pads_first else height * width
        lepe = 0 if self.lepe is None else regions * n * self.dim * self.spec.lepe**2
        out = height * width * self.dim**2 if self.spec.out_proj else 0
        attended = (regions * n * self.top * m + regions**2) * self.qk_dim + regions * n * self.top * m * self.dim
        return x.shape[0] * (projected * self.dim * (2 * self.qk_dim + self.dim) + lepe + attended + out)

    pads_first: bool = True

    def _cut(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Regions a side and tokens of a region a side."""
        raise TypeError(f"{type(self).__name__} must say how it cuts a map.")

    def _split(self, x: Tensor) -> _Regions:
        """Projected tokens of x by region."""
        raise TypeError(f"{type(self).__name__} must say how it projects a map.")

    def _chosen(self, parts: _Regions) -> tuple[Tensor, Tensor]:
        """The regions each one reads, best first, int32 [B, 1, S, top], and their weights [B, S, top]."""
        regions = parts.k.shape[1]
        one = _blocks(regions, 1, 1, parts.q.device)  # descriptors: groups of one token
        q, k = (t[:, None] for t in parts.means)  # [B, 1, S, Cq]
        scored = RouteSpec(
            one, one, Keep(top=self.top), BlockMean(scale=self.scale), differentiable=self.spec.differentiable
        )
        found = route(q, k, _layout(regions, 1, 1), scored)
        assert found.scores is not None  # a router always says how its groups scored
        return found.index, found.scores[:, 0].softmax(-1).to(parts.q.dtype)

    def _lists(self, parts: _Regions, index: Tensor) -> Selection:
        """The blocks of tokens that regions `index` [B, 1, S, listed] mean for each block of a region."""
        (regions, n), m, device = parts.q.shape[1:3], parts.k.shape[2], parts.q.device
        sizes = (self._block(tokens, device) for tokens in (n, m))
        q_part, kv_part = (_blocks(regions, t, size, device) for t, size in zip((n, m), sizes, strict=True))
        rows, columns = q_part.groups // regions, kv_part.groups // regions  # blocks of a region
        place = torch.arange(columns, dtype=torch.int32, device=device)
        listed = (index[..., None] * columns + place).flatten(3).repeat_interleave(rows, 2)
        count = torch.full(listed.shape[:3], listed.shape[3], dtype=torch.int32, device=device)
        return Selection(_layout(regions, n, m), q_part, kv_part, listed, count)

    def _block(self, tokens: int, device: torch.device) -> int:
        """Tokens of a block: a whole region on the CPU, a size of GPU kernels elsewhere, unless the spec says it."""
        if self.spec.block is not None:
            return self.spec.block
        return tokens if device.type in ("cpu", "meta") else _kernel_size(tokens)

    @torch.compiler.disable(reason="regions are chosen by content: lists of blocks are made outside compiled graphs")
    def _attend(self, parts: _Regions) -> Tensor:
        """[B, S, n, dim]: every region over the regions it chose."""
        chosen, weight = self._chosen(parts)
        if self._copies(parts):
            return self._gathered(parts, chosen[:, 0].long())
        q, k, v = (self._by_head(t) for t in (parts.q, parts.k, parts.v))
        score = Score(self.scale)
        if not self.spec.soft:
            out = attend(q, k, v, self._lists(parts, chosen), score=score, backend=self.spec.backend).out
        else:  # a share scales the logits and values of one pair of regions: one branch for each place of the lists
            branches = []
            for place in range(self.top):
                share = weight[:, None, :, place, None, None].expand(-1, -1, -1, parts.q.shape[2], -1).flatten(2, 3)
                single = self._lists(parts, chosen[..., place : place + 1])
                found = attend(q * share, k, v, single, score=score, backend=self.spec.backend)
                branches.append((found.out * share, found.lse))
            out = merge.lse(branches).out
        return out.transpose(1, 2).unflatten(1, parts.q.shape[1:3]).flatten(3)

    def _copies(self, parts: _Regions) -> bool:
        """Whether the keys and values of all lists may be copied side by side: small maps, where lists cost more."""
        if self.spec.soft or self.spec.backend != "auto" or parts.q.is_meta:
            return False
        if parts.q.is_cuda and parts.k.shape[2] > _SMALL:
            return False
        copied = self.top * (parts.k.numel() * parts.k.element_size() + parts.v.numel() * parts.v.element_size())
        return copied <= _COPIED.get(parts.q.device.type, 0)

    def _gathered(self, parts: _Regions, index: Tensor) -> Tensor:
        """index: [B, S, top] regions that each one reads -> [B, S, n, dim], by copies of their keys and values."""
        b, regions, n, _ = parts.q.shape
        rows = (index + regions * torch.arange(b, device=index.device)[:, None, None]).flatten(0, 1)  # [B * S, top]
        q = parts.q.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B * S, heads, n, d]
        k, v = (
            F.embedding(rows, t.flatten(0, 1).flatten(1))  # its gradient sums a region's readers in float32
            .unflatten(-1, (-1, self.heads, t.shape[-1] // self.heads))
            .flatten(1, 2)
            .transpose(1, 2)
            for t in (parts.k, parts.v)
        )  # [B * S, heads, top * m, d]
        out = attend_groups(q, k, v, scale=self.scale)
        return out.transpose(1, 2).reshape(b, regions, n, self.dim)

    def _by_head(self, t: Tensor) -> Tensor:
        """[B, S, n, C] -> [B, heads, S * n, C / heads]."""
        return t.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        return f"dim={self.dim}, heads={self.heads}, regions={self.regions}, top={self.top}"


class BiLevelRoutingAttention(_BiLevelRouting):
    """The operator behind the released weights; keys `qkv.qkv`, `wo`, `lepe`.

    dim, heads: channels and attention heads. regions: regions a side (a number, not their size). top: regions each
    one reads. x: [B, H, W, dim] of any size: zeros are put at the bottom and the right **before** the projection until
    `regions` divides both sides; they carry its bias, count in the means and are ordinary keys.
    """

    def __init__(self, dim: int, heads: int, regions: int = 7, top: int = 4, spec: RoutingSpec = RoutingSpec()) -> None:
        super().__init__(dim, heads, regions, top, spec)
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(dim, 2 * self.qk_dim + dim)})
        self.wo = nn.Linear(dim, dim) if spec.out_proj else nn.Identity()

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        check_map(self, x, self.dim)
        height, width = x.shape[1:3]
        parts, values = self._projected(x)
        out = from_windows(self._attend(parts), parts.size, parts.sides)
        if self.lepe is not None:
            out = out + conv(self.lepe, from_windows(values, parts.size, parts.sides))
        return self.wo(out[:, :height, :width])

    def _cut(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.regions, self.regions), (ceil(height / self.regions), ceil(width / self.regions))

    def _split(self, x: Tensor) -> _Regions:
        return self._projected(x)[0]

    def _projected(self, x: Tensor) -> tuple[_Regions, Tensor]:
        """The parts, and all values [B, S, n, dim] before pooling."""
        grid, sides = self._cut(*x.shape[1:3])
        tokens = to_windows(pad_multiple(x, self.regions), sides)  # [B, S, n, dim]
        q, k, v = self.qkv["qkv"](tokens).split((self.qk_dim, self.qk_dim, self.dim), -1)
        means = (q.mean(2, dtype=high(q)), k.mean(2, dtype=high(k)))
        pooled_k, pooled_v = (_pool(t, sides, self.spec) for t in (k, v))
        return _Regions(q, pooled_k, pooled_v, grid, sides, means), v


class GridRoutingAttention(_BiLevelRouting):
    """The refactored operator ("nchw"); keys `qkv_linear`, `output_linear` (1 x 1 convolutions), `lepe`.

    Regions have floor(side / regions) tokens, so there may be more of them than asked for. Queries, keys and values are
    padded with zeros **after** the projection: padding has logit 0 and value 0, takes part in the softmax, and is no
    part of the means. Equal to `BiLevelRoutingAttention` where `regions` divides the map. A side shorter than
    `regions` is refused.
    """

    pads_first = False

    def __init__(self, dim: int, heads: int, regions: int = 7, top: int = 4, spec: RoutingSpec = RoutingSpec()) -> None:
        super().__init__(dim, heads, regions, top, spec)
        if spec.qk_dim is not None or spec.soft or spec.pooling != "none" or not spec.out_proj:
            raise ValueError(
                "GridRoutingAttention: spec may set scale, lepe and backend alone; use BiLevelRoutingAttention for "
                "qk_dim, pooling, soft or out_proj."
            )
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused. Raises ValueError for a side under `regions`."""
        check_map(self, x, self.dim)
        height, width = x.shape[1:3]
        parts, values = self._projected(x)
        out = from_windows(self._attend(parts), parts.size, parts.sides)[:, :height, :width]
        if self.lepe is not None:
            out = out + conv(self.lepe, values)
        return conv(self.output_linear, out)

    def _cut(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        if min(height, width) < self.regions:
            raise ValueError(
                f"GridRoutingAttention: map of {height} x {width} tokens has fewer than regions={self.regions} a side; "
                f"largest that fits: {min(height, width)}."
            )
        sides = (height // self.regions, width // self.regions)
        return (ceil(height / sides[0]), ceil(width / sides[1])), sides

    def _split(self, x: Tensor) -> _Regions:
        return self._projected(x)[0]

    def _projected(self, x: Tensor) -> tuple[_Regions, Tensor]:
        """The parts, and the map of values [B, H, W, dim]."""
        grid, sides = self._cut(*x.shape[1:3])
        maps = conv(self.qkv_linear, x).chunk(3, -1)
        full = grid[0] * sides[0], grid[1] * sides[1]
        q, k, v = (to_windows(pad_to(t, *full), sides) for t in maps)
        return _Regions(q, k, v, grid, sides, (_mean(q, maps[0], sides), _mean(k, maps[1], sides))), maps[2]


def _mean(padded: Tensor, tokens: Tensor, sides: tuple[int, int]) -> Tensor:
    """Means of regions [B, S, n, C] whose padding is zero, over the tokens that are really there."""
    if padded.shape[1] * padded.shape[2] == tokens.shape[1] * tokens.shape[2]:
        return padded.mean(2, dtype=high(padded))
    there = tokens.new_ones(1, *tokens.shape[1:3], 1)
    count = to_windows(pad_multiple(there, sides), sides).sum(2)  # [1, S, 1]
    return padded.sum(2, dtype=high(padded)) / count


def _pool(t: Tensor, sides: tuple[int, int], spec: RoutingSpec) -> Tensor:
    """Fewer tokens a region: [B, S, n, C] -> [B, S, m, C]."""
    if spec.pooling == "none":
        return t
    maps = to_nchw(t.flatten(0, 1).unflatten(1, sides))  # [B * S, C, h, w]
    if spec.pooling == "adaptive_mean":
        maps = F.adaptive_avg_pool2d(maps, spec.pool)
    elif spec.pooling == "adaptive_max":
        maps = F.adaptive_max_pool2d(maps, spec.pool)
    else:
        _pooled_sides(sides, spec)
        maps = F.avg_pool2d(maps, spec.pool) if spec.pooling == "mean" else F.max_pool2d(maps, spec.pool)
    return to_nhwc(maps).flatten(1, 2).unflatten(0, t.shape[:2])


def _pooled_sides(sides: tuple[int, int], spec: RoutingSpec) -> tuple[int, int]:
    """Keys of a region a side."""
    if spec.pooling == "none":
        return sides
    if spec.pooling.startswith("adaptive"):
        return spec.pool, spec.pool
    if min(sides) < spec.pool:
        raise ValueError(
            f"BiLevelRoutingAttention: pool={spec.pool} is more than a region of {sides[0]} x {sides[1]} tokens; "
            f"largest: {min(sides)}."
        )
    return sides[0] // spec.pool, sides[1] // spec.pool


def _kernel_size(tokens: int) -> int:
    """The largest block of 16, 32, 64 or 128 tokens that pads a region to at most 1.25 times the least padding."""
    padded = {size: ceil(tokens / size) * size for size in (16, 32, 64, 128)}
    least = min(padded.values())
    return max(size for size, room in padded.items() if room <= 1.25 * least)


@lru_cache(maxsize=64)
@ordinary()
def _blocks(regions: int, tokens: int, block: int, device: torch.device) -> Partition:
    """Regions of `tokens` tokens that lie one behind the other, each cut into blocks, the last one short."""
    members = torch.arange(regions * tokens, dtype=torch.int32).reshape(regions, tokens)
    members = F.pad(members, (0, -tokens % block), value=-1).reshape(1, 1, -1, block)
    return Partition(members, f"{regions} regions of {tokens} in blocks of {block}").to(device)


@lru_cache(maxsize=64)
@ordinary()
def _layout(regions: int, n: int, m: int) -> Layout:
    """Queries and keys by region."""
    return Layout(Canvas((regions * n,)), Canvas((regions * m,)))
