"""Gradient of the queries: one query block, its key blocks once more, P made again from the LSE."""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import INF, clean, head_of, logits, row_of, rows, seen, tokens


@triton.jit
def _block(
    acc, q, grad, end, delta, q_token, block, mask, at, k, v, starts, masks, score,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS k of one key block, dS = P (dP - delta) (1 - tanh^2)."""
    k_token = tokens(starts[2], block, BK)
    keys = rows(k, starts[0], k_token, D, WD)
    values = rows(v, starts[1], k_token, DV, WDV)
    s, tanh = logits(q, keys, q_token, k_token, at, score, PRECISION)
    ds = tl.exp(s - end[:, None]) * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    if score[1] is not None:
        ds = ds * (1.0 - tanh * tanh)
    if MASKED or score[4] is not None:
        ds = tl.where(seen(q_token, k_token, at, masks, mask, score[4], MASKED, BK, BQ), ds, 0.0)
        keys = clean(keys)
    return acc + tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)


@triton.jit
def backward_q_kernel(
    q, k, v, grad_out, end, delta, grad_q, q_order, kv_order, owner, full, part, masks, score, heads, group, blocks, nq,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q float32 [B, Hq, blocks * BQ, D] in the order of q_order.

    end: LSE, +inf for empty rows; delta = grad . out - grad of LSE; both [B, Hq, Nq].
    full and part as in the forward kernel. One program a query block.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    member = pid // blocks
    b, h = member // heads, member % heads
    at = (b, h)
    q_token = tokens(row_of(q_order, b, h), block, BQ)
    query = rows(q, head_of(q, b, h), q_token, D, WD)
    grad = rows(grad_out, head_of(grad_out, b, h), q_token, DV, WDV)
    known = member.to(tl.int64) * nq + q_token
    lse = tl.load(end + known, mask=q_token >= 0, other=INF)
    drop = tl.load(delta + known, mask=q_token >= 0, other=0.0)
    starts = (head_of(k, b, h // group), head_of(v, b, h // group), row_of(kv_order, b, h))
    place = tl.load(row_of(owner, b, h)).to(tl.int64) * blocks + block
    acc = tl.zeros([BQ, WD], tl.float32)
    for i in range(tl.load(full[0] + place)):
        other = tl.load(full[1] + place * full[2] + i)
        acc = _block(
            acc, query, grad, lse, drop, q_token, other, other, at, k, v, starts, masks, score,
            D, DV, WD, WDV, BQ, BK, False, PRECISION,
        )  # fmt: skip
    for i in range(tl.load(part[0] + place)):
        other = tl.load(part[1] + place * part[2] + i)
        mask = tl.load(part[3] + place * part[2] + i)
        acc = _block(
            acc, query, grad, lse, drop, q_token, other, mask, at, k, v, starts, masks, score,
            D, DV, WD, WDV, BQ, BK, True, PRECISION,
        )  # fmt: skip
    slot = pid.to(tl.int64) * BQ + tl.arange(0, BQ)
    column = tl.arange(0, WD)
    place_out = grad_q + slot[:, None] * D + column[None, :]
    tl.store(place_out, acc * score[0], mask=(column < D)[None, :] & (slot >= 0)[:, None])
