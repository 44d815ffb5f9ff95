"""q, k and v rounded to 8 bits in plan order, in one pass over each: gather, scale, round, store.

Keys and queries share a scale by groups of slots. Values have a scale for every channel, which a pass over them finds
first, and are stored channel by channel, as 8-bit products want them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import head_of

# 1.5 * 2^23: adding and taking it away again rounds float32 to the nearest integer, halves to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _token(order, b, h, slot, slots, n):
    """Token of each slot, int64, -1 for pads. order: (pointer or None, strides of samples and heads)."""
    if order[0] is None:
        token = tl.where(slot < n, slot, -1)
    else:
        token = tl.load(order[0] + b * order[1] + h * order[2] + slot, mask=slot < slots, other=-1)
    return token.to(tl.int64)


@triton.jit
def _gathered(x, b, h, token, D: tl.constexpr, WD: tl.constexpr):
    column = tl.arange(0, WD)
    place = token[:, None] * x[3] + column.to(tl.int64)[None, :] * x[4]
    live = (token >= 0)[:, None] & (column < D)[None, :]
    return tl.load(head_of(x, b, h) + place, mask=live, other=0.0).to(tl.float32)


@triton.jit
def rounded_kernel(
    x, order, mean, out, scale, heads, slots, n, room, tiles,
    D: tl.constexpr, WD: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """x: (pointer, four strides). out: 8 bits [B, H, room, WD]; scale: float32 [B, H, room / GROUP].

    mean: float32 [B, H, D] taken away first, or None. One program rounds BN slots; BN is a multiple of GROUP.
    """
    pid = tl.program_id(0)
    member, tile = pid // tiles, pid % tiles
    b, h = member // heads, member % heads
    slot = tile * BN + tl.arange(0, BN)
    token = _token(order, b, h, slot, slots, n)
    values = _gathered(x, b, h, token, D, WD)
    column = tl.arange(0, WD)
    if mean is not None:
        drop = tl.load(mean + member.to(tl.int64) * D + column, mask=column < D, other=0.0)
        values = tl.where((token >= 0)[:, None], values - drop[None, :], 0.0)
    parts = tl.reshape(values, (BN // GROUP, GROUP, WD))
    most = tl.maximum(tl.max(tl.max(tl.abs(parts), 2), 1), 1e-7)
    step = most / LARGEST
    parts = parts / step[:, None, None]
    if INT:
        parts = (parts + _ROUND) - _ROUND
    else:
        parts = tl.minimum(tl.maximum(parts, -LARGEST), LARGEST)
    whole = tl.reshape(parts, (BN, WD)).to(out.dtype.element_ty)
    place = (member.to(tl.int64) * room + slot)[:, None] * WD + column[None, :]
    tl.store(out + place, whole, mask=(slot < room)[:, None])
    group = tile * (BN // GROUP) + tl.arange(0, BN // GROUP)
    tl.store(scale + member.to(tl.int64) * (room // GROUP) + group, step, mask=group < room // GROUP)


@triton.jit
def columns_kernel(
    x, out, heads, n, tiles, steps,
    D: tl.constexpr, WD: tl.constexpr, BN: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Sum or largest magnitude of each channel over `steps` tiles of BN tokens: out float32 [B, H, tiles, D]."""
    pid = tl.program_id(0)
    member, tile = pid // tiles, pid % tiles
    b, h = member // heads, member % heads
    found = tl.zeros([BN, WD], tl.float32)
    for i in range(steps):
        token = ((tile * steps + i) * BN + tl.arange(0, BN)).to(tl.int64)
        values = _gathered(x, b, h, tl.where(token < n, token, -1), D, WD)
        found = found + values if SUM else tl.maximum(found, tl.abs(values))
    column = tl.arange(0, WD)
    whole = tl.sum(found, 0) if SUM else tl.max(found, 0)
    tl.store(out + pid.to(tl.int64) * D + column, whole, mask=column < D)


@triton.jit
def turned_kernel(
    v, order, scale, out, heads, slots, n, room, tiles,
    DV: tl.constexpr, WDV: tl.constexpr, BN: tl.constexpr, LARGEST: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """Values rounded by channel: out 8 bits [B, H, WDV, room]; scale: float32 [B, H, DV].

    Of every 16 slots, slot 8 i + 2 c + j comes to place 4 c + 2 i + j: so accumulators of the logits serve as left
    operand of the next product as they lie.
    """
    pid = tl.program_id(0)
    member, tile = pid // tiles, pid % tiles
    b, h = member // heads, member % heads
    slot = tile * BN + tl.arange(0, BN)
    values = _gathered(v, b, h, _token(order, b, h, slot, slots, n), DV, WDV)
    column = tl.arange(0, WDV)
    step = tl.load(scale + member.to(tl.int64) * DV + column, mask=column < DV, other=1.0)
    values = values / step[None, :]
    if INT:
        values = (values + _ROUND) - _ROUND
    else:
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    moved = tl.permute(tl.reshape(values, (BN // 16, 2, 4, 2, WDV)), (0, 2, 1, 3, 4))
    turned = tl.trans(tl.reshape(moved, (BN, WDV)).to(out.dtype.element_ty))
    place = (member.to(tl.int64) * WDV + column)[:, None] * room + slot[None, :]
    tl.store(out + place, turned, mask=(slot < room)[None, :])


@triton.jit
def ordered_kernel(
    v, order, out, heads, slots, n, room, tiles, DV: tl.constexpr, WDV: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Values as they are, in plan order: out [B, H, room, WDV]."""
    pid = tl.program_id(0)
    member, tile = pid // tiles, pid % tiles
    b, h = member // heads, member % heads
    slot = tile * BN + tl.arange(0, BN)
    values = _gathered(v, b, h, _token(order, b, h, slot, slots, n), DV, WDV)
    place = (member.to(tl.int64) * room + slot)[:, None] * WDV + tl.arange(0, WDV)[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=(slot < room)[:, None])
