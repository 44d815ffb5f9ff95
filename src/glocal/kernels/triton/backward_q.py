"""Gradient of the queries: one tile of queries, its key blocks once more, P made again from the LSE."""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import add_dense, add_table, factor, logits, row_of, seen, span, together


@triton.jit
def _block(
    acc, q, grad, end, delta, q_slot, k_slot, mask, at, k_desc, v_desc, base, words, score, row, bias,
    QB: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS k of keys k_slot .. k_slot + BN, dS = P (dP - delta) (1 - tanh^2)."""
    places = span(k_slot, BN)
    keys = k_desc.load([base + k_slot, 0])
    values = v_desc.load([base + k_slot, 0])
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    s, tanh = logits(s, q_slot, places, at, score, False)
    p = tl.exp2(s * factor(score) - end[:, None])
    ds = p * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    if MASKED:
        ds = tl.where(seen(words, mask, row, k_slot % KB, QB, KB, BM, BN), ds, 0.0)
    if score[4] is not None:
        ds = tl.where(together(score[4], q_slot, places, at, False), ds, 0.0)
    if bias[0] is not None:
        add_dense(bias[0], score[2], ds, q_slot, places, at)
    if bias[1] is not None:
        add_table(bias[1], score[3], ds, q_slot, places, at)
    if score[1] is not None:
        ds = ds * (1.0 - tanh * tanh)
    return tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)


@triton.jit
def backward_q_kernel(
    q_desc, grad_desc, k_desc, v_desc, end, delta, grad_q, q_order, owner, full, part, words, score, bias,
    heads, group, blocks, q_room, room, n,
    D: tl.constexpr, WD: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DIRECT: tl.constexpr, MASKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q [B, Hq, n, D] by token if DIRECT, else float32 in slot order with n slots.

    Descriptors hold rows in slot order: queries of `q_room` slots a head, keys of `room`. end: LSE in base 2, +inf for
    empty rows; delta = grad . out - grad of LSE; both [B, Hq, q_room]. full and part as in the forward kernel.
    bias: (dense, table) gradients of biases to add to, or None each.
    """
    SPLIT: tl.constexpr = QB // BM
    STEPS: tl.constexpr = KB // BN
    pid = tl.program_id(0)
    tiles = blocks * SPLIT
    member = pid // tiles
    tile = tiles - 1 - pid % tiles
    b, h = member // heads, member % heads
    at = (b, h)
    row = tile % SPLIT * BM
    q_slot = tile * BM + tl.arange(0, BM)
    q_token = tl.load(row_of(q_order, b, h) + q_slot)
    query = q_desc.load([member * q_room + tile * BM, 0])
    grad = grad_desc.load([member * q_room + tile * BM, 0])
    known = member.to(tl.int64) * q_room + q_slot
    lse = tl.load(end + known)
    drop = tl.load(delta + known)
    base = (b * (heads // group) + h // group) * room
    place = tl.load(row_of(owner, b, h)).to(tl.int64) * blocks + tile // SPLIT
    acc = tl.zeros([BM, WD], tl.float32)
    for i in range(tl.load(full[0] + place) * STEPS):
        k_slot = tl.load(full[1] + place * full[2] + i // STEPS) * KB + i % STEPS * BN
        acc = _block(
            acc, query, grad, lse, drop, q_slot, k_slot, 0, at, k_desc, v_desc, base, words, score, row,
            bias, QB, KB, BM, BN, False, PRECISION,
        )  # fmt: skip
    if MASKS:
        for i in range(tl.load(part[0] + place) * STEPS):
            entry = place * part[2] + i // STEPS
            k_slot = tl.load(part[1] + entry) * KB + i % STEPS * BN
            mask = tl.load(part[3] + entry)
            acc = _block(
                acc, query, grad, lse, drop, q_slot, k_slot, mask, at, k_desc, v_desc, base, words, score, row,
                bias, QB, KB, BM, BN, True, PRECISION,
            )  # fmt: skip
    column = tl.arange(0, WD)
    to = q_token if DIRECT else q_slot
    live = q_token >= 0 if DIRECT else q_slot >= 0
    place_out = grad_q + (member.to(tl.int64) * n + to)[:, None] * D + column[None, :]
    tl.store(place_out, (acc * score[0]).to(grad_q.dtype.element_ty), mask=live[:, None] & (column < D)[None, :])
