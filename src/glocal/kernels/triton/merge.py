"""From slots of a plan back to tokens, without atomics: each token walks over its own slots in a fixed order.

A token outside the order has no slot: 0, and -inf for its LSE. A query in several slots merges what it saw in each.
`slots` lists the slots of all tokens, token by token; `starts` says where a token's part begins, one entry more than
there are tokens. Both are int32 [batch|1, heads|1, ...].
"""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import INF, row_of


@triton.jit
def merge_kernel(
    partial, partial_lse, out, lse, slots, starts, heads, n, room, tiles,
    DV: tl.constexpr, WDV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial [B, H, room, DV] and partial_lse [B, H, room] -> out [B, H, n, DV], lse [B, H, n]."""
    pid = tl.program_id(0)
    member = pid // tiles
    b, h = member // heads, member % heads
    token = (pid % tiles) * BN + tl.arange(0, BN)
    inside = token < n
    column = tl.arange(0, WDV)
    begin = tl.load(row_of(starts, b, h) + token, mask=inside, other=0)
    count = tl.load(row_of(starts, b, h) + token + 1, mask=inside, other=0) - begin
    acc = tl.zeros([BN, WDV], tl.float32)
    top = tl.full([BN], -INF, tl.float32)
    total = tl.zeros([BN], tl.float32)
    for i in range(tl.max(count, 0)):
        live = i < count
        slot = tl.load(row_of(slots, b, h) + begin + i, mask=live, other=0)
        place = member.to(tl.int64) * room + slot
        mine = tl.load(partial_lse + place, mask=live, other=-INF)
        new = tl.where(top >= mine, top, mine)  # NaN wins
        shift = tl.where(new == -INF, 0.0, new)
        weight, old = tl.exp(mine - shift), tl.exp(top - shift)
        values = tl.load(
            partial + place[:, None] * DV + column[None, :], mask=live[:, None] & (column < DV)[None, :], other=0.0
        )
        # A side of weight 0 adds nothing, whatever it holds.
        acc = tl.where((old == 0)[:, None], 0.0, acc * old[:, None])
        acc += tl.where((weight == 0)[:, None], 0.0, values * weight[:, None])
        total = total * old + weight
        top = new
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    place_out = member.to(tl.int64) * n + token
    to = out + place_out[:, None] * DV + column[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < DV)[None, :])
    tl.store(lse + place_out, top + tl.log(total), mask=inside)


@triton.jit
def fold_kernel(
    partial, out, slots, starts, heads, split, shared, n, room, tiles,
    D: tl.constexpr, WD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sum of partial [B, heads * split, room, D] over the slots and units of a token -> out [B, heads, n, D].

    shared: query heads a unit, by which the plan counts.
    """
    pid = tl.program_id(0)
    member = pid // tiles
    b, head = member // heads, member % heads
    token = (pid % tiles) * BN + tl.arange(0, BN)
    inside = token < n
    column = tl.arange(0, WD)
    acc = tl.zeros([BN, WD], tl.float32)
    for j in range(split):
        unit = head * split + j
        begin = tl.load(row_of(starts, b, unit * shared) + token, mask=inside, other=0)
        count = tl.load(row_of(starts, b, unit * shared) + token + 1, mask=inside, other=0) - begin
        for i in range(tl.max(count, 0)):
            live = i < count
            slot = tl.load(row_of(slots, b, unit * shared) + begin + i, mask=live, other=0)
            place = (member.to(tl.int64) * split + j) * room + slot
            acc += tl.load(
                partial + place[:, None] * D + column[None, :], mask=live[:, None] & (column < D)[None, :], other=0.0
            )
    to = out + (member.to(tl.int64) * n + token)[:, None] * D + column[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
