"""Gradients of keys and values: one tile of keys and the query blocks that list it, over all query heads of its head.

Tiles lie the other way round, [keys, queries], so that weights and their gradients enter the products from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import factor, logits, row_of, seen, span, together


@triton.jit
def _block(
    state, keys, values, k_slot, q_start, mask, at, q_desc, grad_desc, known, base, words, score, row,
    QB: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, COLUMN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS^T q and P^T dO of queries q_start .. q_start + BM to state = (grad of keys, of values, sums of dS)."""
    grad_k, grad_v, column = state
    q_slot = span(q_start, BM)
    query = q_desc.load([base + q_start, 0])
    grad = grad_desc.load([base + q_start, 0])
    end, delta = tl.load(known[0] + q_slot), tl.load(known[1] + q_slot)
    s = tl.dot(keys, tl.trans(query), input_precision=PRECISION)  # [BN, BM]
    s, tanh = logits(s, q_slot, k_slot, at, score, True)
    p = tl.exp2(s * factor(score) - end[None, :])
    if MASKED:
        p = tl.where(seen(words, mask, row, q_start % QB, KB, QB, BN, BM), p, 0.0)
    if score[4] is not None:
        p = tl.where(together(score[4], q_slot, k_slot, at, True), p, 0.0)
    grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    ds = p * (tl.dot(values, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    if COLUMN:
        column += tl.sum(ds, 1)
    if score[1] is not None:
        ds = ds * (1.0 - tanh * tanh)
    grad_k = tl.dot(ds.to(query.dtype), query, grad_k, input_precision=PRECISION)
    return grad_k, grad_v, column


@triton.jit
def backward_kv_kernel(
    q_desc, grad_desc, k_desc, v_desc, end, delta, grad_k, grad_v, grad_bias, kv_order, owner, full, part, words, score,
    units, shared, split, blocks, q_room, n,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DIRECT: tl.constexpr, MASKS: tl.constexpr, COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v [B, units, n, D or DV], by token if DIRECT, else float32 in slot order with n slots.

    A unit is a key head with its `shared` query heads or, where the plan differs by query head, one of the `split`
    query heads of a key head. full and part: (begins, counts, query blocks, mask rows), begins and counts
    by list and key block.
    COLUMN: grad_bias float32 [B, Hq, blocks * KB] gets the sums of dS over queries, the gradient of a bias by key.
    One program a tile of keys and unit.
    """
    SPLIT: tl.constexpr = KB // BN
    STEPS: tl.constexpr = QB // BM
    pid = tl.program_id(0)
    tiles = blocks * SPLIT
    member = pid // tiles
    tile = pid % tiles
    b, unit = member // units, member % units
    first = unit * shared
    row = tile % SPLIT * BN
    k_slot = tile * BN + tl.arange(0, BN)
    base = (b * (units // split) + unit // split) * blocks * KB + tile * BN
    keys = k_desc.load([base, 0])
    values = v_desc.load([base, 0])
    to_k = tl.zeros([BN, WD], tl.float32)
    to_v = tl.zeros([BN, WDV], tl.float32)
    for j in range(shared):
        h = first + j
        at = (b, h)
        rows_before = b * units * shared + h
        known = (end + rows_before.to(tl.int64) * q_room, delta + rows_before.to(tl.int64) * q_room)
        place = tl.load(row_of(owner, b, h)).to(tl.int64) * blocks + tile // SPLIT
        column = tl.zeros([BN], tl.float32)
        begin = tl.load(full[0] + place)
        for i in range(tl.load(full[1] + place) * STEPS):
            q_start = tl.load(full[2] + begin + i // STEPS) * QB + i % STEPS * BM
            to_k, to_v, column = _block(
                (to_k, to_v, column), keys, values, k_slot, q_start, 0, at, q_desc, grad_desc, known,
                rows_before * q_room, words, score, row, QB, KB, BM, BN, False, COLUMN, PRECISION,
            )  # fmt: skip
        if MASKS:
            begin = tl.load(part[0] + place)
            for i in range(tl.load(part[1] + place) * STEPS):
                q_start = tl.load(part[2] + begin + i // STEPS) * QB + i % STEPS * BM
                mask = tl.load(part[3] + begin + i // STEPS)
                to_k, to_v, column = _block(
                    (to_k, to_v, column), keys, values, k_slot, q_start, mask, at, q_desc, grad_desc, known,
                    rows_before * q_room, words, score, row, QB, KB, BM, BN, True, COLUMN, PRECISION,
                )  # fmt: skip
        if COLUMN:
            tl.store(grad_bias + rows_before.to(tl.int64) * blocks * KB + k_slot, column)
    token = tl.load(row_of(kv_order, b, first) + k_slot)
    to = token if DIRECT else k_slot
    live = (token >= 0 if DIRECT else k_slot >= 0)[:, None]
    place = member.to(tl.int64) * n + to
    column, column_v = tl.arange(0, WD), tl.arange(0, WDV)
    to_k = (to_k * score[0]).to(grad_k.dtype.element_ty)
    tl.store(grad_k + place[:, None] * D + column[None, :], to_k, mask=(column < D)[None, :] & live)
    to_v = to_v.to(grad_v.dtype.element_ty)
    tl.store(grad_v + place[:, None] * DV + column_v[None, :], to_v, mask=(column_v < DV)[None, :] & live)
