"""Backward of window attention where tiles share no keys, as in windows and grids: one pass makes every gradient.

What `backward_tiles` reads and computes twice, for queries and for keys, is here read and computed once: weights of a
tile, made again from the LSE, serve its queries and, turned, its keys. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.windows.tile import (
    INF,
    LOG2E,
    clean,
    ends,
    ill_rows,
    load_rows,
    offsets,
    store_sums,
    table_of,
    tile_rows,
)


@triton.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "nq", "nk"])
def whole_kernel(
    q, k, v, out, grad, grad_lse, lse, grad_q, grad_k, grad_v, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr,
    SAME: tl.constexpr,
):  # fmt: skip
    """grad_q, and grad_k and grad_v by query head: (pointer, strides) as of q; tiles of M queries and their N keys.

    SAME: these have the strides and sizes of q, k and v, all equal. TABLE and grad_table: as in
    `backward_tiles.queries_kernel`, other arguments too.
    """
    taint = _program(
        q, k, v, out, grad, grad_lse, lse, grad_q, grad_k, grad_v, grad_table, q_tokens, k_tokens, masks, table, scale,
        heads, ratio, images, per, count, groups, nq, nk, D, DV, WD, WDV, G, M, N, PRECISION, TABLE, SAME, False,
    )  # fmt: skip
    if tl.max(tl.where(tl.abs(taint) < INF, 0, 1)) > 0:  # pyright: ignore[reportOperatorIssue]
        _program(
            q, k, v, out, grad, grad_lse, lse, grad_q, grad_k, grad_v, grad_table, q_tokens, k_tokens, masks, table,
            scale, heads, ratio, images, per, count, groups, nq, nk,
            D, DV, WD, WDV, G, M, N, PRECISION, TABLE, SAME, True,
        )  # fmt: skip


@triton.jit
def _program(
    q, k, v, out, grad, grad_lse, lse, grad_q, grad_k, grad_v, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr,
    SAME: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All images of a program; [G, N], not finite for a key whose gradients were not in some image."""
    pid = tl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    chunk = (pid // groups) // heads
    q_token, q_some = tile_rows(q_tokens, group, count, G, M, M)  # pyright: ignore[reportGeneralTypeIssues]
    k_token, k_some = tile_rows(k_tokens, group, count, G, N, N)
    start = table_of(masks, group, count, q_token, k_token, h, table, scale, G, M, N, N)
    q_at, k_at = offsets(q_some, q[3], q[4], WD), offsets(k_some, k[3], k[4], WD)
    o_at = offsets(q_some, out[3], out[4], WDV)
    v_at = k_at if SAME else offsets(k_some, v[3], v[4], WDV)
    to_q = q_at if SAME else offsets(q_some, grad_q[3], grad_q[4], WD)
    to_k = k_at if SAME else offsets(k_some, grad_k[3], grad_k[4], WD)
    to_v = k_at if SAME else offsets(k_some, grad_v[3], grad_v[4], WDV)
    mine, theirs = tl.expand_dims(q_token >= 0, -1), tl.expand_dims(k_token >= 0, -1)
    rate = scale * LOG2E
    sums = tl.zeros(start.shape, tl.float32)
    taint = tl.zeros(k_token.shape, tl.float32)
    for i in range(tl.minimum(per, images - chunk * per)):
        image = (chunk * per + i).to(tl.int64)
        row = (image * heads + h) * nq
        head = h.to(tl.int64)
        query = load_rows(q[0] + image * q[1] + head * q[2], q_at, D, WD)
        key = load_rows(k[0] + image * k[1] + (h // ratio).to(tl.int64) * k[2], k_at, D, WD)
        values = load_rows(v[0] + image * v[1] + (h // ratio).to(tl.int64) * v[2], v_at, DV, WDV)
        g = load_rows(grad[0] + image * grad[1] + head * grad[2], o_at, DV, WDV)
        done = load_rows(out[0] + image * out[1] + head * out[2], o_at, DV, WDV)
        end, share = ends(lse + row, grad_lse + row, g, done, q_some)
        s = tl.dot(query, _turned(key), acc=start, input_precision=PRECISION)
        p = tl.exp2(s * rate - tl.expand_dims(end, -1))
        ds = p * (tl.dot(g, _turned(values), input_precision=PRECISION) + tl.expand_dims(share, -1))
        if CAREFUL:
            ds, p = tl.where(start == -INF, 0.0, ds), tl.where(start == -INF, 0.0, p)
            p = tl.where((start > -INF) & tl.expand_dims(ill_rows(g), -1), float("nan"), p)
            query, key, g = clean(query), clean(key), clean(g)
        if TABLE:
            sums += ds
        ds, p = ds.to(key.dtype), p.to(g.dtype)
        for_q = tl.dot(ds, key, input_precision=PRECISION)
        for_k = tl.dot(_turned(ds), query, input_precision=PRECISION)
        for_v = tl.dot(_turned(p), g, input_precision=PRECISION)
        written = tl.arange(0, WD) < D
        from_q = grad_q[0] + image * grad_q[1] + head * grad_q[2]
        from_k = grad_k[0] + image * grad_k[1] + head * grad_k[2]
        tl.store(from_q + to_q, (for_q * scale).to(grad_q[0].dtype.element_ty), mask=mine & written)
        tl.store(from_k + to_k, (for_k * scale).to(grad_k[0].dtype.element_ty), mask=theirs & written)
        written = tl.arange(0, WDV) < DV
        from_v = grad_v[0] + image * grad_v[1] + head * grad_v[2]
        tl.store(from_v + to_v, for_v.to(grad_v[0].dtype.element_ty), mask=theirs & written)
        taint += tl.sum(for_k, -1) + tl.sum(for_v, -1)
    if TABLE:
        store_sums(grad_table, sums, chunk, h, heads, group, count, 0, G, M, N, N)
    return taint


@triton.jit
def _turned(x):
    """[G, m, n] -> [G, n, m]."""
    if len(x.shape) == 2:
        x = tl.trans(x)
    else:
        x = tl.permute(x, (0, 2, 1))
    return x
