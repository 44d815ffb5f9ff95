"""Gradients of keys and values: one key block and the query blocks that list it, over all query heads of its head."""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import INF, clean, head_of, logits, row_of, rows, seen, tokens


@triton.jit
def _block(
    state, keys, values, k_token, block, mask, at, q, grad_out, known, starts, masks, score,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS^T q and P^T dO of one query block to state = (grad of keys, grad of values)."""
    grad_k, grad_v = state
    q_token = tokens(starts[2], block, BQ)
    query = rows(q, starts[0], q_token, D, WD)
    grad = rows(grad_out, starts[1], q_token, DV, WDV)
    end = tl.load(known[0] + q_token, mask=q_token >= 0, other=INF)
    delta = tl.load(known[1] + q_token, mask=q_token >= 0, other=0.0)
    s, tanh = logits(query, keys, q_token, k_token, at, score, PRECISION)
    p = tl.exp(s - end[:, None])
    ds = p * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    if score[1] is not None:
        ds = ds * (1.0 - tanh * tanh)
    if MASKED or score[4] is not None:
        found = seen(q_token, k_token, at, masks, mask, score[4], MASKED, BK, BQ)
        ill = tl.max(tl.where(tl.abs(grad.to(tl.float32)) < INF, 0, 1), 1) > 0
        p = tl.where(found, tl.where(ill[:, None], float("nan"), p), 0.0)
        ds = tl.where(found, ds, 0.0)
        query, grad = clean(query), clean(grad)
    grad_v += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
    grad_k += tl.dot(tl.trans(ds.to(query.dtype)), query, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def backward_kv_kernel(
    q, k, v, grad_out, end, delta, grad_k, grad_v, q_order, kv_order, owner, full, part, masks, score,
    units, shared, split, blocks, nq,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v float32 [B, units, blocks * BK, D or DV] in the order of kv_order.

    A unit is a key head with its `shared` query heads or, where the plan differs by query head, one of the `split`
    query heads of a key head. full and part hold the query blocks of each key block. One program a key block and unit.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    member = pid // blocks
    b, unit = member // units, member % units
    first = unit * shared
    k_token = tokens(row_of(kv_order, b, first), block, BK)
    keys = rows(k, head_of(k, b, unit // split), k_token, D, WD)
    values = rows(v, head_of(v, b, unit // split), k_token, DV, WDV)
    to_k = tl.zeros([BK, WD], tl.float32)
    to_v = tl.zeros([BK, WDV], tl.float32)
    for j in range(shared):
        h = first + j
        at = (b, h)
        row = (b.to(tl.int64) * units * shared + h) * nq
        known = (end + row, delta + row)
        starts = (head_of(q, b, h), head_of(grad_out, b, h), row_of(q_order, b, h))
        place = tl.load(row_of(owner, b, h)).to(tl.int64) * blocks + block
        for i in range(tl.load(full[0] + place)):
            other = tl.load(full[1] + place * full[2] + i)
            to_k, to_v = _block(
                (to_k, to_v), keys, values, k_token, other, other, at, q, grad_out, known, starts, masks, score,
                D, DV, WD, WDV, BQ, BK, False, PRECISION,
            )  # fmt: skip
        for i in range(tl.load(part[0] + place)):
            other = tl.load(part[1] + place * part[2] + i)
            mask = tl.load(part[3] + place * part[2] + i)
            to_k, to_v = _block(
                (to_k, to_v), keys, values, k_token, other, mask, at, q, grad_out, known, starts, masks, score,
                D, DV, WD, WDV, BQ, BK, True, PRECISION,
            )  # fmt: skip
    slot = pid.to(tl.int64) * BK + tl.arange(0, BK)
    column, column_v = tl.arange(0, WD), tl.arange(0, WDV)
    live = (slot >= 0)[:, None]
    tl.store(grad_k + slot[:, None] * D + column[None, :], to_k * score[0], mask=(column < D)[None, :] & live)
    tl.store(grad_v + slot[:, None] * DV + column_v[None, :], to_v, mask=(column_v < DV)[None, :] & live)
