"""Backward of window attention with operands read straight into registers (see `direct`); 16-bit numbers, no atomics.

As `backward_tiles`, which is the same in Triton and takes the other calls: queries gather from their keys, keys from
the queries that see them, weights are computed again from the LSE.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from glocal.kernels.windows.direct import (
    INF,
    LOG2E,
    along,
    clean,
    ill_columns,
    listed,
    load_both,
    load_rows,
    logits,
    operand,
    piece_of,
    pieces_of,
    products,
    row_offsets,
    settled,
    store_rows,
    tokens,
    turned,
    twos,
)


@gluon.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "n"])
def queries_kernel(
    q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ALL: gl.constexpr, PIECES: gl.constexpr, SPLIT: gl.constexpr,
    TABLE: gl.constexpr,
):  # fmt: skip
    """Arguments as in `backward_tiles.queries_kernel`, QUERIES always; the tiles have SPLIT times ALL keys."""
    taint = _queries_program(
        q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
        heads, ratio, images, per, count, groups, n,
        D, DV, WD, WDV, G, M, N, ALL, PIECES, SPLIT, TABLE, False,
    )  # fmt: skip
    if gl.max(gl.max(gl.where(gl.abs(taint) < INF, 0, 1), 1), 0) > 0:
        _queries_program(
            q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
            heads, ratio, images, per, count, groups, n,
            D, DV, WD, WDV, G, M, N, ALL, PIECES, SPLIT, TABLE, True,
        )  # fmt: skip


@gluon.jit
def _queries_program(
    q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ALL: gl.constexpr, PIECES: gl.constexpr, SPLIT: gl.constexpr,
    TABLE: gl.constexpr, CAREFUL: gl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    C: gl.constexpr = products(G, M)
    LEFT: gl.constexpr = operand(0, G, M, along(WD))
    RIGHT: gl.constexpr = operand(1, G, M, along(WD))
    LEFT_V: gl.constexpr = operand(0, G, M, along(WDV))
    HELD: gl.constexpr = TABLE or not CAREFUL
    pid = gl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    chunk = (pid // groups) // heads
    mine, some = tokens(q_tokens, group, count, G, M, M, SPLIT, gl.SliceLayout(2, C))
    own = mine >= 0
    q_at = row_offsets(q_tokens, group, count, q, G, M, SPLIT, WD, LEFT)
    o_at = row_offsets(q_tokens, group, count, out, G, M, SPLIT, WDV, LEFT_V)
    if HELD:
        seen, places = pieces_of(
            q_tokens, k_tokens, masks, group, count, h, table, scale, RIGHT, G, M, N, ALL, PIECES, SPLIT,
            table is None and not CAREFUL,
        )  # fmt: skip
    sums = ()
    if TABLE:
        for _ in gl.static_range(PIECES):
            sums = sums + (gl.zeros([G, M, N], gl.float32, layout=C),)
    taint = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
    for i in range(gl.minimum(per, images - chunk * per)):
        image = (chunk * per + i).to(gl.int64)
        rate = scale * LOG2E
        row = (image * heads + h) * n
        query = load_rows(q[0] + image * q[1] + h.to(gl.int64) * q[2], q_at, D, WD, LEFT)
        from_k, from_v = k[0] + (h // ratio).to(gl.int64) * k[2], v[0] + (h // ratio).to(gl.int64) * v[2]
        g = load_rows(grad[0] + image * grad[1] + h.to(gl.int64) * grad[2], o_at, DV, WDV, LEFT_V)
        end = gl.load(lse + row + some)
        empty = end == -INF
        end = gl.where(empty, INF, end * LOG2E)
        share = gl.where(empty, 0.0, gl.load(grad_lse + row + some))
        done = load_rows(out[0] + image * out[1] + h.to(gl.int64) * out[2], o_at, DV, WDV, LEFT_V)
        delta = gl.sum(g.to(gl.float32) * done.to(gl.float32), 2)
        share -= gl.convert_layout(delta, gl.SliceLayout(2, C))
        gl.store(known + (row + mine) * 2, end, mask=own)
        gl.store(known + (row + mine) * 2 + 1, share, mask=own)
        query, g = settled(query, per >> 30), settled(g, per >> 30)
        found = gl.zeros([G, M, WD], gl.float32, layout=C)
        keys, values = (from_k + image * k[1], k[3], k[4]), (from_v + image * v[1], v[3], v[4])
        added = ()
        if HELD:
            for c in gl.static_range(PIECES):
                found, ds = _for_queries(
                    query, g, keys, values, seen[c], places[c], i, end, share, found, rate,
                    D, DV, WD, WDV, G, M, N, CAREFUL,
                )  # fmt: skip
                if TABLE:
                    added = added + (sums[c] + ds,)
        else:
            for c in range(PIECES):
                start, place = piece_of(
                    c, q_tokens, k_tokens, masks, group, count, h, table, scale, RIGHT, G, M, N, ALL, SPLIT
                )  # fmt: skip
                found, ds = _for_queries(
                    query, g, keys, values, start, place, i, end, share, found, rate,
                    D, DV, WD, WDV, G, M, N, CAREFUL,
                )  # fmt: skip
        if TABLE:
            sums = added
        store_rows(grad_q, found * scale, q_tokens, group, count, image, h, D, WD, G, M, SPLIT)
        taint += gl.sum(found, 2)
    if TABLE:
        place = (chunk * heads + h).to(gl.int64) * count * (M * ALL * SPLIT)
        turn = group * G + gl.arange(0, G, layout=gl.SliceLayout(1, gl.SliceLayout(2, C)))
        turn = gl.expand_dims(gl.expand_dims(turn, 1), 2)
        line = gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, C)))
        line = turn // SPLIT * M + gl.expand_dims(gl.expand_dims(line, 0), 2)
        column = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, C)))
        at = line * (ALL * SPLIT) + turn % SPLIT * ALL + gl.expand_dims(gl.expand_dims(column, 0), 1)
        for c in gl.static_range(PIECES):
            gl.store(grad_table + place + c * N + at, sums[c], mask=turn // SPLIT < count)
    return taint


@gluon.jit
def _for_queries(
    query, g, k, v, seen, place, i, end, share, found, rate,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr, G: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, CAREFUL: gl.constexpr,
):  # fmt: skip
    """found [G, M, WD] with what N keys more add to it, and the gradient of their logits [G, M, N]."""
    key, values = load_both(k, v, place, i, D, DV, WD, WDV, G, M)
    p = gl.exp2(logits(query, key, seen, G, M, N) * rate - gl.expand_dims(end, 2))
    ds = p * mma_v2(g, values, gl.expand_dims(share, 2) + gl.zeros([G, M, N], gl.float32, layout=products(G, M)))
    if CAREFUL:
        ds, key = gl.where(seen == -INF, 0.0, ds), clean(key)
    left = gl.convert_layout(ds.to(key.dtype), operand(0, G, M, 2))
    return mma_v2(left, turned(key, G, M, N, WD), found), ds


@gluon.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "nq", "nk"])
def keys_kernel(
    q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ALL: gl.constexpr, PIECES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Arguments as in `backward_tiles.keys_kernel`; the tiles have SPLIT times ALL queries."""
    taint = _keys_program(
        q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
        heads, ratio, images, per, count, groups, nq, nk, D, DV, WD, WDV, G, M, N, ALL, PIECES, SPLIT, False,
    )  # fmt: skip
    if gl.max(gl.max(gl.where(gl.abs(taint) < INF, 0, 1), 1), 0) > 0:
        _keys_program(
            q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
            heads, ratio, images, per, count, groups, nq, nk, D, DV, WD, WDV, G, M, N, ALL, PIECES, SPLIT, True,
        )  # fmt: skip


@gluon.jit
def _keys_program(
    q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ALL: gl.constexpr, PIECES: gl.constexpr, SPLIT: gl.constexpr,
    CAREFUL: gl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    C: gl.constexpr = products(G, M)
    LEFT: gl.constexpr = operand(0, G, M, along(WD))
    RIGHT: gl.constexpr = operand(1, G, M, along(WD))
    LEFT_V: gl.constexpr = operand(0, G, M, along(WDV))
    pid = gl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    first = (pid // groups) // heads * per
    k_at = row_offsets(k_tokens, group, count, k, G, M, SPLIT, WD, LEFT)
    v_at = row_offsets(k_tokens, group, count, v, G, M, SPLIT, WDV, LEFT_V)
    if not CAREFUL:
        seen, places = pieces_of(
            k_tokens, q_tokens, masks, group, count, h, table, scale, RIGHT, G, M, N, ALL, PIECES, SPLIT, table is None
        )
    taint = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
    for i in range(gl.minimum(per, images - first)):
        image = (first + i).to(gl.int64)
        rate = scale * LOG2E
        row = (image * heads + h) * nq
        from_k, from_v = k[0] + (h // ratio).to(gl.int64) * k[2], v[0] + (h // ratio).to(gl.int64) * v[2]
        from_q = q[0] + h.to(gl.int64) * q[2]
        key = load_rows(from_k + image * k[1], k_at, D, WD, LEFT)
        values = load_rows(from_v + image * v[1], v_at, DV, WDV, LEFT_V)
        key, values = settled(key, per >> 30), settled(values, per >> 30)
        for_k = gl.zeros([G, M, WD], gl.float32, layout=C)
        for_v = gl.zeros([G, M, WDV], gl.float32, layout=C)
        queries = (from_q + image * q[1], q[3], q[4])
        grads = (grad[0] + image * grad[1] + h.to(gl.int64) * grad[2], grad[3], grad[4])
        if CAREFUL:
            for c in range(PIECES):
                start, some = piece_of(
                    c, k_tokens, q_tokens, masks, group, count, h, table, scale, RIGHT, G, M, N, ALL, SPLIT
                )  # fmt: skip
                listing = listed(q_tokens + c * N, group, count * SPLIT, G, N, ALL, 1, gl.SliceLayout(2, twos(G, M, N)))
                for_k, for_v = _for_keys(
                    key, values, queries, grads, known + row * 2, start, some, listing, i, for_k, for_v, rate,
                    D, DV, WD, WDV, G, M, N, True,
                )  # fmt: skip
        else:
            for c in gl.static_range(PIECES):
                listing = listed(q_tokens + c * N, group, count * SPLIT, G, N, ALL, 1, gl.SliceLayout(2, twos(G, M, N)))
                for_k, for_v = _for_keys(
                    key, values, queries, grads, known + row * 2, seen[c], places[c], listing, i, for_k, for_v, rate,
                    D, DV, WD, WDV, G, M, N, False,
                )  # fmt: skip
        store_rows(grad_v, for_v, k_tokens, group, count, image, h, DV, WDV, G, M, SPLIT)
        store_rows(grad_k, for_k * scale, k_tokens, group, count, image, h, D, WD, G, M, SPLIT)
        taint += gl.sum(for_k, 2) + gl.sum(for_v, 2)
    return taint


@gluon.jit
def _for_keys(
    key, values, q, grad, known, seen, place, listing, i, for_k, for_v, rate,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr, G: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, CAREFUL: gl.constexpr,
):  # fmt: skip
    """for_k [G, M, WD] and for_v [G, M, WDV] with what N queries more add to them; listing: the queries in `twos`."""
    C: gl.constexpr = products(G, M)
    side = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(0, twos(G, M, N))))
    at = gl.expand_dims(gl.maximum(listing, 0), 2) * 2 + gl.expand_dims(gl.expand_dims(side, 0), 0)
    end, share = gl.split(gl.load(known + at))  # what pads read is hidden
    end = gl.convert_layout(end, gl.SliceLayout(1, C), assert_trivial=True)
    share = gl.convert_layout(share, gl.SliceLayout(1, C), assert_trivial=True)
    query, g = load_both(q, grad, place, i, D, DV, WD, WDV, G, M)
    p = gl.exp2(logits(key, query, seen, G, M, N) * rate - gl.expand_dims(end, 1))
    ds = p * mma_v2(values, g, gl.expand_dims(share, 1) + gl.zeros([G, M, N], gl.float32, layout=C))
    if CAREFUL:
        ds, p = gl.where(seen == -INF, 0.0, ds), gl.where(seen == -INF, 0.0, p)
        ill = gl.convert_layout(ill_columns(g), gl.SliceLayout(1, C))
        p = gl.where((seen > -INF) & (gl.expand_dims(ill, 1) > 0), float("nan"), p)
        g, query = clean(g), clean(query)
    p = gl.convert_layout(p.to(g.dtype), operand(0, G, M, 2))
    ds = gl.convert_layout(ds.to(query.dtype), operand(0, G, M, 2))
    return mma_v2(ds, turned(query, G, M, N, WD), for_k), mma_v2(p, turned(g, G, M, N, WDV), for_v)
