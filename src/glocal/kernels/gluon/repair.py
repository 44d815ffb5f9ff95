"""Query blocks whose values came out not finite, computed again with care: a value that is not finite reaches the rows
that see it and no others.

The fast kernel multiplies hidden values by a weight of 0, which is not 0 if the value is infinite or NaN. It marks the
blocks where that shows; here one program a block looks at its mark, and almost always has nothing to do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.forward_q import _block
from glocal.kernels.triton.tile import INF, head_of, row_of, rows, tokens


@triton.jit
def repair_kernel(
    ill, q, k, v, out, lse, order, n, q_order, kv_order, owner, full, part, masks, score, heads, group, blocks,
    PARTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """ill: int32 [B * Hq * blocks, PARTS]. out [B, Hq, n, DV], lse [B, Hq, n]: at the tokens of the plan row `order`,
    or at slots where it is None. The rest is as in `glocal.kernels.triton.forward_q`.
    """
    pid = tl.program_id(0)
    wrong = tl.load(ill + pid.to(tl.int64) * PARTS)
    if PARTS == 2:
        wrong += tl.load(ill + pid.to(tl.int64) * PARTS + 1)
    if wrong > 0:
        block = pid % blocks
        member = pid // blocks
        b, h = member // heads, member % heads
        at = (b, h)
        q_token = tokens(row_of(q_order, b, h), block, BQ)
        query = rows(q, head_of(q, b, h), q_token, D, WD)
        starts = (head_of(k, b, h // group), head_of(v, b, h // group), row_of(kv_order, b, h))
        place = tl.load(row_of(owner, b, h)).to(tl.int64) * blocks + block
        acc = tl.zeros([BQ, WDV], tl.float32)
        top = tl.full([BQ], -INF, tl.float32)
        total = tl.zeros([BQ], tl.float32)
        for i in range(tl.load(full[0] + place)):
            other = tl.load(full[1] + place * full[2] + i)
            acc, top, total = _block(
                (acc, top, total), query, q_token, other, other, at, k, v, starts, masks, score,
                D, DV, WD, WDV, BQ, BK, False, "tf32",
            )  # fmt: skip
        for i in range(tl.load(part[0] + place)):
            other = tl.load(part[1] + place * part[2] + i)
            mask = tl.load(part[3] + place * part[2] + i)
            acc, top, total = _block(
                (acc, top, total), query, q_token, other, mask, at, k, v, starts, masks, score,
                D, DV, WD, WDV, BQ, BK, True, "tf32",
            )  # fmt: skip
        slot = block * BQ + tl.arange(0, BQ)
        token = tl.where(slot < n, slot, -1).to(tl.int64) if order is None else q_token
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        column = tl.arange(0, WDV)
        to = member.to(tl.int64) * n + token
        there = (token >= 0)[:, None] & (column < DV)[None, :]
        tl.store(out + to[:, None] * DV + column[None, :], acc.to(out.dtype.element_ty), mask=there)
        tl.store(lse + to, top + tl.log(total), mask=token >= 0)
