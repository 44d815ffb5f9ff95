"""What a router of blocks does around attention, in one pass each: means and spreads of groups, the blocks that hold a
mass, and what rectification does to the rows of a group (Rectified SpaAttn, arXiv 2511.19835).

The definitions are `glocal.routing.shares`, `glocal.routing.keep` and `glocal.ops.epilogue`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels.triton.work import on_device, start

_MOST = 1 << 15  # entries of a group that one program holds
WIDE = 4096  # columns of a row that one program sorts
_ROWS = 64


def holds(tokens: int, size: int) -> bool:
    """Whether one program can hold a group of `tokens` rows of `size`."""
    return bool(triton.next_power_of_2(tokens) * triton.next_power_of_2(size) <= _MOST)


@triton.jit
def stats_kernel(
    x, sb, sh, sn, sd, members, mean, spread, heads, groups, most,
    D: tl.constexpr, WD: tl.constexpr, TOKENS: tl.constexpr, WHOLE: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """One program a group: mean over its tokens, and mean distance of each channel from it. WHOLE: pads count as 0."""
    pid = tl.program_id(0)
    group, member = pid % groups, pid // groups
    b, h = member // heads, member % heads
    slot, column = tl.arange(0, TOKENS), tl.arange(0, WD)
    token = tl.load(members + group * most + slot, mask=slot < most, other=-1)
    start_at = x + b.to(tl.int64) * sb + h.to(tl.int64) * sh
    live = token >= 0
    place = token.to(tl.int64)[:, None] * sn + column.to(tl.int64)[None, :] * sd
    rows = tl.load(start_at + place, mask=live[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    if WHOLE:
        count, live = most, slot < most
    else:
        count = tl.maximum(tl.sum(live.to(tl.int32), 0), 1)
    middle = tl.sum(rows, 0) / count
    to = pid.to(tl.int64) * D + column
    tl.store(mean + to, middle, mask=column < D)
    if SPREAD:
        far = tl.where(live[:, None], tl.abs(rows - middle[None, :]), 0.0)
        tl.store(spread + to, tl.sum(far, 0) / count, mask=column < D)


@triton.jit
def _ordered(bits):
    """The bits of floats as integers in the order of the floats; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mass_kernel(scores, won, columns, mass, first, least, WIDE: tl.constexpr):
    """One program a row: the best columns that together hold `mass` of the softmax, `first` more, `least` at least.

    Scores and places are sorted as one number, so that ties go to the lowest place.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDE)
    score = tl.load(scores + row * columns + place, mask=place < columns, other=float("-inf"))
    score = tl.where(score == 0, 0.0, score)  # -0 is 0
    key = (~_ordered(score.to(tl.int32, bitcast=True))).to(tl.int64) * WIDE + place
    key = tl.sort(key, 0)
    place = (key & (WIDE - 1)).to(tl.int32)
    best = _ordered(~((key - place) // WIDE).to(tl.int32)).to(tl.float32, bitcast=True)
    top = tl.max(best, 0)
    weight = tl.exp(best - tl.where(top == float("-inf"), 0.0, top))
    total = tl.cumsum(weight, 0) / tl.maximum(tl.sum(weight, 0), 1e-38)
    rank = tl.arange(0, WIDE)
    budget = tl.sum(((total <= mass) & (rank < columns)).to(tl.int32), 0) + first
    taken = (rank < tl.maximum(budget, least)) & (best > float("-inf"))
    tl.store(won + row * columns + place, taken, mask=place < columns)


@triton.jit
def rectify_kernel(
    out, to, label, scale, add, heads, n, groups, tiles,
    D: tl.constexpr, WD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program some rows of a head: factor and addend of the group of each; a row without a group stays."""
    pid = tl.program_id(0)
    member = (pid // tiles).to(tl.int64)
    row, column = pid % tiles * ROWS + tl.arange(0, ROWS), tl.arange(0, WD)
    group = tl.load(label + row, mask=row < n, other=-1)
    place = (member * n + row)[:, None] * D + column[None, :]
    inside = (row < n)[:, None] & (column < D)[None, :]
    there = group >= 0
    values = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(scale + member * groups + group, mask=there, other=1.0).to(tl.float32)
    from_ = (member * groups + group)[:, None] * D + column[None, :]
    more = tl.load(add + from_, mask=inside & there[:, None], other=0.0).to(tl.float32)
    tl.store(to + place, values * factor[:, None] + more, mask=inside)


def group_stats(x: Tensor, members: Tensor, whole: bool, spread: bool) -> tuple[Tensor, Tensor]:
    """As `glocal.routing.shares.group_stats`."""
    b, h, _, d = x.shape
    groups, most = members.shape
    mean = torch.empty(b, h, groups, d, dtype=torch.float32, device=x.device)
    far = torch.empty_like(mean) if spread else mean.new_empty(0)
    if mean.numel():
        with on_device(x):
            start(
                stats_kernel, b * h * groups, x, *x.stride(), members.int().contiguous(), mean, far, h, groups, most,
                D=d, WD=triton.next_power_of_2(d), TOKENS=triton.next_power_of_2(most), WHOLE=whole, SPREAD=spread,
                num_warps=8 if most * d > 8192 else 4,
            )  # fmt: skip
    return mean, far


def by_mass(scores: Tensor, mass: float, first: int, least: int) -> Tensor:
    """As `glocal.routing.keep.by_mass`, for rows of at most 4,096 columns."""
    won = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    columns = scores.shape[-1]
    if won.numel():
        scores = scores.float().contiguous()
        wide = max(16, triton.next_power_of_2(columns))
        with on_device(scores):
            start(
                mass_kernel, won.numel() // columns, scores, won.view(torch.uint8), columns, mass, first, least,
                WIDE=wide, num_warps=1 if wide <= 128 else 4,
            )  # fmt: skip
    return won


def rectify(out: Tensor, label: Tensor, scale: Tensor, add: Tensor) -> Tensor:
    """out [B, H, N, D], label int32 [N], scale [B, H, groups], add [B, H, groups, D] -> [B, H, N, D]."""
    b, h, n, d = out.shape
    to = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if to.numel():
        tiles = -(-n // _ROWS)
        with on_device(out):
            start(
                rectify_kernel, b * h * tiles, out.contiguous(), to, label, scale.contiguous(), add.contiguous(),
                h, n, scale.shape[2], tiles, D=d, WD=triton.next_power_of_2(d), ROWS=_ROWS, num_warps=4,
            )  # fmt: skip
    return to
