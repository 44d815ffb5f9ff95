"""What all kernels share: token rows gathered by plan order, logits of a tile, and which of its pairs are seen.

Tensors come as tuples, pointer first. `at` is (sample, query head). `score` is (scale, soft-cap, dense bias, table
bias, segments), where all but the scale may be None. Offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))


@triton.jit
def head_of(t, b, h):
    """Start of the rows of sample b, head h. t: (pointer, strides of sample, head, row, column)."""
    return t[0] + b.to(tl.int64) * t[1] + h.to(tl.int64) * t[2]


@triton.jit
def row_of(t, b, h):
    """Start of a plan row. t: (pointer, stride of samples, stride of heads, query heads a plan head)."""
    return t[0] + b.to(tl.int64) * t[1] + (h // t[3]).to(tl.int64) * t[2]


@triton.jit
def tokens(order, block, SIZE: tl.constexpr):
    """Tokens of one block, int64 [SIZE]; -1 pads."""
    return tl.load(order + block.to(tl.int64) * SIZE + tl.arange(0, SIZE)).to(tl.int64)


@triton.jit
def rows(t, start, token, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Rows [n, WIDE] of `token` [n]; pads and columns from SIZE on are 0."""
    column = tl.arange(0, WIDE)
    place = token[:, None] * t[3] + column.to(tl.int64)[None, :] * t[4]
    return tl.load(start + place, mask=(token >= 0)[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def clean(x):
    """Entries that are not finite become 0: they belong to pairs that are hidden or are charged elsewhere."""
    return tl.where(tl.abs(x.to(tl.float32)) < INF, x, 0.0).to(x.dtype)


@triton.jit
def logits(q, k, q_token, k_token, at, score, PRECISION: tl.constexpr):
    """Logits [q, k] before masks, -inf at key pads, and the tanh of the soft-cap (the logits where there is none)."""
    pads = tl.where(k_token >= 0, 0.0, -INF)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score[0]
    tanh = s
    if score[1] is not None:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * (s / score[1])) + 1.0)
        s = tanh * score[1]
    if score[2] is not None:
        s += _dense(score[2], q_token, k_token, at)
    if score[3] is not None:
        s += _looked_up(score[3], q_token, k_token, at)
    return s + pads[None, :], tanh


@triton.jit
def _dense(bias, q_token, k_token, at):
    start = head_of(bias, at[0], at[1])
    place = q_token[:, None] * bias[3] + k_token[None, :] * bias[4]
    return tl.load(start + place, mask=(q_token >= 0)[:, None] & (k_token >= 0)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _looked_up(table, q_token, k_token, at):
    """table: (values, head stride, width, codes of queries, codes of keys)."""
    mine = tl.load(table[3] + q_token, mask=q_token >= 0, other=0)
    theirs = tl.load(table[4] + k_token, mask=k_token >= 0, other=0)
    place = theirs[None, :] - mine[:, None]
    inside = (place >= 0) & (place < table[2])
    return tl.load(table[0] + at[1].to(tl.int64) * table[1] + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def seen(q_token, k_token, at, masks, mask, segments, MASKED: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr):
    """Bool [q, k]. MASKED: row `mask` of the bit table applies. segments: (queries, keys, Nq, Nk) or None."""
    found = (q_token >= -1)[:, None] & (k_token >= 0)[None, :]
    if MASKED:
        WORDS: tl.constexpr = (BK + 31) // 32
        row, column = tl.arange(0, BQ), tl.arange(0, BK)
        start = masks + mask.to(tl.int64) * (BQ * WORDS)
        word = tl.load(start + row[:, None] * WORDS + (column // 32)[None, :])
        found = found & (((word >> (column % 32)[None, :]) & 1) == 1)
    if segments is not None:
        b = at[0].to(tl.int64)
        mine = tl.load(segments[0] + b * segments[2] + q_token, mask=q_token >= 0, other=-1)
        theirs = tl.load(segments[1] + b * segments[3] + k_token, mask=k_token >= 0, other=-1)
        found = found & (mine[:, None] == theirs[None, :]) & (mine >= 0)[:, None]
    return found
