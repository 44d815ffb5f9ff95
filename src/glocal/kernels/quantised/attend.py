"""Attention over 8-bit tiles in plan order: one query tile against its full and partial key blocks, online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import row_of

_INF = tl.constexpr(float("inf"))
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _block(
    state, q, q_scale, block, start, k8, k_scale, v8, live, words,
    D: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ROOM,
    QK: tl.constexpr, PV: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Fold one key block into state = (sum of weights times values, largest logit in base 2, sum of weights).

    k8, v8: descriptors of all slots by row, and of values by row or by channel. start: first row of the key head.
    words: pointers to the mask bits of this tile's rows, or None for a full block.
    """
    acc, top, total = state
    row = start + block * BK
    k = k8.load([row, 0])
    if QK == "int8":
        s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    else:
        s = tl.dot(q, tl.trans(k))
    if GROUP >= BK:
        s = s * (q_scale * tl.load(k_scale + row // GROUP))[:, None]
    else:
        each = tl.load(k_scale + row // GROUP + tl.arange(0, BK) // GROUP)
        s = s * q_scale[:, None] * each[None, :]
    if live is not None:
        s = tl.where((tl.load(live + block * BK + tl.arange(0, BK)) != 0)[None, :], s, -_INF)
    if words is not None:
        word = tl.load(words + tl.arange(0, BK // 32)[None, :])
        bits = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        s = tl.where(tl.reshape(bits, s.shape) == 1, s, -_INF)
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == -_INF, 0.0, new) if (live is not None) or (words is not None) else new
    p = tl.exp2(s - (base - SHIFT)[:, None])
    old = tl.exp2(top - base)
    total = total * old + tl.sum(p, 1)
    if PV == "none":
        v = v8.load([row, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None])
    else:
        v = v8.load([(start // ROOM) * DV, block * BK])
        p = tl.permute(tl.reshape(p, (p.shape[0], BK // 16, 2, 4, 2)), (0, 1, 3, 2, 4))  # as values lie
        p = tl.reshape(p, (p.shape[0], BK))
        if PV == "fp8":
            acc = tl.dot(p.to(tl.float8e4nv), tl.trans(v), acc * old[:, None])
        else:
            p = ((p + _ROUND) - _ROUND).to(tl.int8)
            acc = acc * old[:, None] + tl.dot(p, tl.trans(v), out_dtype=tl.int32).to(tl.float32)
    return acc, new, total


@triton.jit
def attend_kernel(
    q8, k8, v8, q_scale, k_scale, v_scale, live, out, lse, owner, full, part, masks,
    scale, heads, group, tiles, rows, room, split,
    D: tl.constexpr, DV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, rows, DV] and lse [B, Hq, rows] by slot. One program a tile of BQ queries, `split` tiles a block.

    q8 [B, Hq, rows, D]. Descriptors: k8 [B * Hkv * room, D]; v8 [B * Hkv * DV, room] in 8 bits, or like k8.
    live: int8 [b|1, h|1, room] for `row_of`, or None. SHIFT: log2 of what a weight of 1 becomes.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    member = pid // tiles
    b, h = member // heads, member % heads
    row = tile * BQ + tl.arange(0, BQ)
    at = member.to(tl.int64) * rows + row
    q = tl.load(q8 + at[:, None] * D + tl.arange(0, D)[None, :])
    mine = tl.load(q_scale + (member.to(tl.int64) * rows + row) // Q_GROUP) * (scale * _LOG2E)
    start = (b * (heads // group) + h // group) * room
    shown = None if live is None else row_of(live, b, h)
    place = tl.load(row_of(owner, b, h)).to(tl.int64) * (tiles // split) + tile // split
    acc = tl.zeros([BQ, DV], tl.float32)
    top = tl.full([BQ], -_INF, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    list_full = full[1] + place * full[2]
    for i in tl.range(0, tl.load(full[0] + place), num_stages=STAGES):
        block = tl.load(list_full + i)
        acc, top, total = _block(
            (acc, top, total), q, mine, block, start, k8, k_scale, v8, shown, None,
            D, DV, BK, K_GROUP, room, QK, PV, SHIFT,
        )  # fmt: skip
    list_part = part[1] + place * part[2]
    list_mask = part[3] + place * part[2]
    inner = (tile % split) * BQ + tl.arange(0, BQ)
    for i in tl.range(0, tl.load(part[0] + place), num_stages=STAGES):
        block = tl.load(list_part + i)
        mask = tl.load(list_mask + i).to(tl.int64)
        words = masks + (mask * (BQ * split) + inner)[:, None] * (BK // 32)
        acc, top, total = _block(
            (acc, top, total), q, mine, block, start, k8, k_scale, v8, shown, words,
            D, DV, BK, K_GROUP, room, QK, PV, SHIFT,
        )  # fmt: skip
    none = total == 0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    column = tl.arange(0, DV)
    if PV != "none":
        acc = acc * tl.load(v_scale + (start // room) * DV + column)[None, :]
    tl.store(out + at[:, None] * DV + column[None, :], acc.to(out.dtype.element_ty))
    tl.store(lse + at, tl.where(none, -_INF, (top + tl.log2(total) - SHIFT) * _LN2))
