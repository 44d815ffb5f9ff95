"""One query block against its full and partial key blocks: online softmax (arXiv 2205.14135), rows in plan order."""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import INF, clean, head_of, logits, row_of, rows, seen, tokens


@triton.jit
def _block(
    state, q, q_token, block, mask, at, k, v, starts, masks, score,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one key block into state = (sum of weights times values, largest logit, sum of weights)."""
    acc, top, total = state
    k_token = tokens(starts[2], block, BK)
    s, _ = logits(q, rows(k, starts[0], k_token, D, WD), q_token, k_token, at, score, PRECISION)
    values = rows(v, starts[1], k_token, DV, WDV)
    HIDES: tl.constexpr = MASKED or score[4] is not None
    if HIDES:
        found = seen(q_token, k_token, at, masks, mask, score[4], MASKED, BK, BQ)
        s = tl.where(found, s, -INF)
    new = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new == -INF, 0.0, new)
    p = tl.exp(s - shift[:, None])
    old = tl.exp(top - shift)
    total = total * old + tl.sum(p, 1)
    if HIDES:  # a value that is not finite reaches the rows that see it and no others
        ill = tl.max(tl.where(tl.abs(values.to(tl.float32)) < INF, 0, 1), 1) > 0
        p = tl.where(found & ill[None, :], float("nan"), p)
        values = clean(values)
    acc = acc * old[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    return acc, new, total


@triton.jit
def forward_kernel(
    q, k, v, out, lse, q_order, kv_order, owner, full, part, masks, score, heads, group, blocks,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out float32 [B, Hq, blocks * BQ, DV] and lse [B, Hq, blocks * BQ], slots in the order of q_order.

    full: (counts, block numbers, width); part: (counts, block numbers, width, mask rows). One program a query block.
    """
    pid = tl.program_id(0)
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
            D, DV, WD, WDV, BQ, BK, False, PRECISION,
        )  # fmt: skip
    for i in range(tl.load(part[0] + place)):
        other = tl.load(part[1] + place * part[2] + i)
        mask = tl.load(part[3] + place * part[2] + i)
        acc, top, total = _block(
            (acc, top, total), query, q_token, other, mask, at, k, v, starts, masks, score,
            D, DV, WD, WDV, BQ, BK, True, PRECISION,
        )  # fmt: skip
    slot = pid.to(tl.int64) * BQ + tl.arange(0, BQ)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    column = tl.arange(0, WDV)
    tl.store(out + slot[:, None] * DV + column[None, :], acc, mask=(column < DV)[None, :] & (slot >= 0)[:, None])
    tl.store(lse + slot, top + tl.log(total))
