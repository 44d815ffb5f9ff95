"""One tile of queries against its full and partial key blocks: online softmax (arXiv 2205.14135)."""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import INF, LN2, factor, head_of, keys_at, logits, row_of, rows, seen, together


@triton.jit
def _block(
    state, q, q_slot, k_slot, mask, at, k, v, starts, base, words, score, row,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold keys k_slot .. k_slot + BN into state = (sum of weights times values, largest logit, sum of weights)."""
    acc, top, total = state
    keys = keys_at(k[0], k[1], starts[0], starts[2], base, k_slot, BN, D, WD)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    places = k_slot + tl.arange(0, BN)
    s, _ = logits(s, q_slot, places, at, score, False)
    if MASKED:
        s = tl.where(seen(words, mask, row, k_slot % KB, QB, KB, BM, BN), s, -INF)
    if HOLES:
        s += tl.where(tl.load(starts[2] + places) >= 0, 0.0, -INF)[None, :]
    if score[4] is not None:
        s = tl.where(together(score[4], q_slot, places, at, False), s, -INF)
    new = tl.maximum(top, tl.max(s, 1) * factor(score))
    shift = tl.where(new == -INF, 0.0, new)
    p = tl.exp2(s * factor(score) - shift[:, None])
    old = tl.exp2(top - shift)
    total = total * old + tl.sum(p, 1)
    values = keys_at(v[0], v[1], starts[1], starts[2], base, k_slot, BN, DV, WDV)
    acc = tl.dot(p.to(values.dtype), values, acc * old[:, None], input_precision=PRECISION)
    return acc, new, total


@triton.jit
def forward_kernel(
    q, k_desc, k, v_desc, v, out, lse, q_order, kv_order, owner, full, part, words, score, heads, group, blocks,
    room, n,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DIRECT: tl.constexpr, HOLES: tl.constexpr, MASKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """DIRECT: out [B, Hq, n, DV], lse [B, Hq, n], rows by token; otherwise float32 rows in slot order, n its length.

    k_desc, v_desc: descriptors over [samples * key heads * room] rows in slot order; None: k and v are gathered.
    full: (counts, block numbers, width); part: (counts, block numbers, width, mask rows). room: slots of kv_order.
    group: query heads a head of the descriptors. MASKS: whether partial blocks exist.
    One program a tile of BM queries; later tiles start first: under causal patterns they are the longest.
    """
    SPLIT: tl.constexpr = QB // BM
    STEPS: tl.constexpr = KB // BN
    pid = tl.program_id(0)
    tiles = blocks * SPLIT
    member = pid // tiles
    tile = tiles - 1 - pid % tiles
    block = tile // SPLIT
    b, h = member // heads, member % heads
    at = (b, h)
    row = tile % SPLIT * BM
    q_slot = tile * BM + tl.arange(0, BM)
    q_token = tl.load(row_of(q_order, b, h) + q_slot)
    query = rows(q, head_of(q, b, h), q_token, D, WD)
    starts = (head_of(k, b, h // group), head_of(v, b, h // group), row_of(kv_order, b, h))
    base = (b * (heads // group) + h // group) * room
    place = tl.load(row_of(owner, b, h)).to(tl.int64) * blocks + block
    acc = tl.zeros([BM, WDV], tl.float32)
    top = tl.full([BM], -INF, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for i in range(tl.load(full[0] + place) * STEPS):
        k_slot = tl.load(full[1] + place * full[2] + i // STEPS) * KB + i % STEPS * BN
        acc, top, total = _block(
            (acc, top, total), query, q_slot, k_slot, 0, at, (k_desc, k), (v_desc, v), starts, base, words, score, row,
            D, DV, WD, WDV, QB, KB, BM, BN, False, HOLES, PRECISION,
        )  # fmt: skip
    if MASKS:
        for i in range(tl.load(part[0] + place) * STEPS):
            entry = place * part[2] + i // STEPS
            k_slot = tl.load(part[1] + entry) * KB + i % STEPS * BN
            mask = tl.load(part[3] + entry)
            acc, top, total = _block(
                (acc, top, total), query, q_slot, k_slot, mask, at, (k_desc, k), (v_desc, v), starts, base, words,
                score, row, D, DV, WD, WDV, QB, KB, BM, BN, True, HOLES, PRECISION,
            )  # fmt: skip
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    end = (top + tl.log2(total)) * LN2
    to = q_token if DIRECT else q_slot
    live = q_token >= 0 if DIRECT else q_slot >= 0
    to_row = member.to(tl.int64) * n + to
    column = tl.arange(0, WDV)
    tl.store(
        out + to_row[:, None] * DV + column[None, :], acc.to(out.dtype.element_ty),
        mask=live[:, None] & (column < DV)[None, :],
    )  # fmt: skip
    tl.store(lse + to_row, end, mask=live)
