"""Rows brought into plan order in one pass, so that inner loops read whole boxes, and cleaned on the way.

A row with an entry that is not finite must reach those who see it and no others, and 0 * NaN is NaN: so values of such
keys become 0, and their keys NaN where logits are made (forward) and 0 where gradients are (backward, which knows of
NaN by the LSE).
"""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import INF, LOG2E, head_of, row_of, rows


@triton.jit
def _ill(x):
    """Rows that hold an entry which is not finite."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < INF, 0, 1), 1) > 0


@triton.jit
def ordered_keys_kernel(
    k, v, to_k, to_v, kv_order, heads, step, shared, room, tiles, FILL, when,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """k, v [B, Hkv, n, D] -> [B, heads, room, PD], PD >= D. FILL: what the keys of bad rows become.

    step: heads of the result a key head. shared: query heads a head of the result, by which the plan counts.
    when: int32 [1], nothing is done where it holds 0; None: always.
    """
    if when is not None:  # noqa: SIM102 (known when compiling, unlike what `and` would join to it)
        if tl.load(when) == 0:
            return
    pid = tl.program_id(0)
    member = pid // tiles
    b, h = member // heads, member % heads
    slot = pid % tiles * BM + tl.arange(0, BM)
    token = tl.load(row_of(kv_order, b, h * shared) + slot, mask=slot < room, other=-1)
    keys = rows(k, head_of(k, b, h // step), token, D, WD)
    values = rows(v, head_of(v, b, h // step), token, DV, WDV)
    bad = _ill(values)
    keys = tl.where((bad | _ill(keys))[:, None], FILL, keys.to(tl.float32)).to(keys.dtype)
    values = tl.where(bad[:, None], 0.0, values.to(tl.float32)).to(values.dtype)
    place = member.to(tl.int64) * room + slot
    column, column_v = tl.arange(0, WD), tl.arange(0, WDV)
    live = (slot < room)[:, None]
    tl.store(to_k + place[:, None] * PD + column[None, :], keys, mask=live & (column < PD)[None, :])
    tl.store(to_v + place[:, None] * PDV + column_v[None, :], values, mask=live & (column_v < PDV)[None, :])


@triton.jit
def ordered_rows_kernel(
    q, grad, out, lse, grad_lse, to_q, to_grad, end, delta, q_order, heads, n, room, tiles, found, when,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    BM: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """What backward reads of each query slot: q, grad of out (both only if COPY), LSE in base 2, and
    delta = grad . out - grad of LSE. A slot that is a pad or sees nothing gets an LSE of +inf, hence weights of 0; a
    row that holds a bad entry an LSE of NaN, and zeros elsewhere.

    found: int32 [1], becomes 1 if a row is bad, or sees nothing and holds a bad entry; None: no matter. Then q is read
    of rows that see nothing alone, without COPY: in others a bad entry shows in the LSE. when: as above.

    out [B, Hq, n, DV], lse and grad_lse [B, Hq, n], contiguous.
    """
    if when is not None:  # noqa: SIM102
        if tl.load(when) == 0:
            return
    pid = tl.program_id(0)
    member = pid // tiles
    b, h = member // heads, member % heads
    slot = pid % tiles * BM + tl.arange(0, BM)
    token = tl.load(row_of(q_order, b, h) + slot, mask=slot < room, other=-1)
    known = member.to(tl.int64) * n + token
    top = tl.load(lse + known, mask=token >= 0, other=-INF)
    empty = top == -INF
    if found is None:
        query = rows(q, head_of(q, b, h), token, D, WD)
    else:
        query = rows(q, head_of(q, b, h), tl.where(empty, token, -1), D, WD)
    g = rows(grad, head_of(grad, b, h), token, DV, WDV)
    o = rows(out, head_of(out, b, h), token, DV, WDV)
    through = tl.load(grad_lse + known, mask=(token >= 0) & (top != -INF), other=0.0)
    drop = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1) - through
    drop = tl.where(empty, 0.0, drop)
    ill = _ill(query) | _ill(g)
    bad = (ill | (tl.abs(drop) == INF) | (drop != drop) | (top == INF) | (top != top)) & ~empty
    if found is not None:  # noqa: SIM102
        if tl.max((bad | ill).to(tl.int32), 0) > 0:
            tl.store(found, 1)
    top = tl.where(empty, INF, tl.where(bad, float("nan"), top * LOG2E))
    place = member.to(tl.int64) * room + slot
    tl.store(end + place, top, mask=slot < room)
    tl.store(delta + place, tl.where(bad, 0.0, drop), mask=slot < room)
    if COPY:
        query = tl.where((bad | empty)[:, None], 0.0, query.to(tl.float32)).to(query.dtype)
        g = tl.where((bad | empty)[:, None], 0.0, g.to(tl.float32)).to(g.dtype)
        column, column_v = tl.arange(0, WD), tl.arange(0, WDV)
        live = (slot < room)[:, None]
        tl.store(to_q + place[:, None] * PD + column[None, :], query, mask=live & (column < PD)[None, :])
        tl.store(to_grad + place[:, None] * PDV + column_v[None, :], g, mask=live & (column_v < PDV)[None, :])
