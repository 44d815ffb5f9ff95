"""What the kernels share: rows gathered by token, logits of a tile, and which of its pairs are seen.

Logits are kept in base 2, so that a weight is one exp2. `score` is a tuple
(scale, soft-cap, dense bias, table bias, segments, early); all but the scale may be None. Without cap and bias the
scale is multiplied in where a maximum is subtracted (one fused multiply-add), unless `early` is set, as it must be for
a scale that is not positive. Segments, codes and tokens are in slot order, [samples, heads, room]; -1 pads.
Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_of(t, b, h):
    """Start of the rows of sample b, head h. t: (pointer, strides of sample, head, row, column)."""
    return t[0] + b.to(tl.int64) * t[1] + h.to(tl.int64) * t[2]


@triton.jit
def row_of(t, b, h):
    """Start of a plan row. t: (pointer, stride of samples, stride of heads, query heads a plan head)."""
    return t[0] + b.to(tl.int64) * t[1] + (h // t[3]).to(tl.int64) * t[2]


@triton.jit
def span(start, n: tl.constexpr):
    """Slots start .. start + n."""
    return start + tl.arange(0, n)


@triton.jit
def rows(t, start, token, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Rows [n, WIDE] of `token` [n]; pads and columns from SIZE on are 0."""
    column = tl.arange(0, WIDE)
    place = token.to(tl.int64)[:, None] * t[3] + column.to(tl.int64)[None, :] * t[4]
    return tl.load(start + place, mask=(token >= 0)[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def keys_at(desc, t, start, order, base, slot, n: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Rows [n, WIDE] of slots slot .. slot + n: from a descriptor over rows in slot order, or gathered by `order`.

    base: row of slot 0 in the descriptor. desc: None gathers.
    """
    if desc is not None:
        return desc.load([base + slot, 0])
    else:
        return rows(t, start, tl.load(order + slot + tl.arange(0, n)), SIZE, WIDE)


@triton.jit
def logits(s, q_slot, k_slot, at, score, T: tl.constexpr) -> Any:
    """Raw products [q, k] to logits in base 2 before the factor, and the tanh of the soft-cap.

    T: the tile lies the other way round, [k, q]. q_slot, k_slot: slots of its rows and columns.
    """
    tanh = s
    if score[1] is not None:
        tanh = 1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E * score[0] / score[1])) + 1.0)
        s = tanh * (score[1] * LOG2E)
    elif score[2] is not None or score[3] is not None or score[5] is not None:
        s = s * (score[0] * LOG2E)
    if score[2] is not None:
        s += LOG2E * _dense(score[2], q_slot, k_slot, at, T)
    if score[3] is not None:
        s += LOG2E * _looked_up(score[3], q_slot, k_slot, at, T)
    return s, tanh


@triton.jit
def factor(score):
    """What a logit of `logits` is multiplied with."""
    if score[1] is not None or score[2] is not None or score[3] is not None or score[5] is not None:
        return 1.0
    else:
        return score[0] * LOG2E


@triton.jit
def _pair(q, k, T: tl.constexpr):
    """Vectors of queries and keys laid over the tile."""
    if T:
        return q[None, :], k[:, None]
    else:
        return q[:, None], k[None, :]


@triton.jit
def _dense(bias, q_slot, k_slot, at, T: tl.constexpr):
    """bias: (values, four strides, query tokens, key tokens), tokens as plan rows."""
    q_token = tl.load(row_of(bias[5], at[0], at[1]) + q_slot)
    k_token = tl.load(row_of(bias[6], at[0], at[1]) + k_slot)
    q_token, k_token = _pair(q_token, k_token, T)
    start = head_of(bias, at[0], at[1])
    place = q_token.to(tl.int64) * bias[3] + k_token.to(tl.int64) * bias[4]
    return tl.load(start + place, mask=(q_token >= 0) & (k_token >= 0), other=0.0).to(tl.float32)


@triton.jit
def _looked_up(table, q_slot, k_slot, at, T: tl.constexpr):
    """table: (values, head stride, width, codes of queries, codes of keys), codes as plan rows."""
    mine = tl.load(row_of(table[3], at[0], at[1]) + q_slot)
    theirs = tl.load(row_of(table[4], at[0], at[1]) + k_slot)
    mine, theirs = _pair(mine, theirs, T)
    place = theirs - mine
    inside = (place >= 0) & (place < table[2])
    return tl.load(table[0] + at[1].to(tl.int64) * table[1] + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def add_dense(grad, bias, ds, q_slot, k_slot, at):
    """Add dS [q, k] to the gradient of a dense bias. grad: (values, four strides); bias as in `score`."""
    q_token = tl.load(row_of(bias[5], at[0], at[1]) + q_slot)[:, None]
    k_token = tl.load(row_of(bias[6], at[0], at[1]) + k_slot)[None, :]
    place = q_token.to(tl.int64) * grad[3] + k_token.to(tl.int64) * grad[4]
    tl.atomic_add(head_of(grad, at[0], at[1]) + place, ds, mask=(q_token >= 0) & (k_token >= 0), sem="relaxed")


@triton.jit
def add_table(grad, table, ds, q_slot, k_slot, at):
    """Add dS [q, k] to the gradient of a table, float32 in its shape."""
    mine = tl.load(row_of(table[3], at[0], at[1]) + q_slot)[:, None]
    theirs = tl.load(row_of(table[4], at[0], at[1]) + k_slot)[None, :]
    place = theirs - mine
    inside = (place >= 0) & (place < table[2])
    tl.atomic_add(grad + at[1].to(tl.int64) * table[1] + place, ds, mask=inside, sem="relaxed")


@triton.jit
def seen(words, mask, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Bool [M, N] of one mask of ROWS x COLUMNS, from `row` and `column` on. words: as `masks.fragments` lays them."""
    WORDS: tl.constexpr = (COLUMNS + 127) // 128 * 4
    place = (mask.to(tl.int64) * ROWS + row + tl.arange(0, M)) * WORDS + column // 128 * 4
    word = tl.load(words + place[:, None] + tl.arange(0, 4)[None, :])  # [M, 4]
    octet = tl.arange(0, N // 8)
    bit = (column % 128 // 8 + octet)[None, :, None, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    word = tl.broadcast_to(word[:, None, :, None], [M, N // 8, 4, 2])
    return tl.reshape(((word >> bit) & 1) == 1, [M, N])


@triton.jit
def together(segments, q_slot, k_slot, at, T: tl.constexpr):
    """Bool tile: pairs of one document. segments: (queries, keys) as plan rows; pads belong to none."""
    mine = tl.load(row_of(segments[0], at[0], at[1]) + q_slot)
    theirs = tl.load(row_of(segments[1], at[0], at[1]) + k_slot)
    mine, theirs = _pair(mine, theirs, T)
    return (mine == theirs) & (mine >= 0)
