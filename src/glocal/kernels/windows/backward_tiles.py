"""Backward of window attention, without atomics: queries gather from their keys, keys from the queries that see them.

The set of queries that see a key is not its neighbourhood: at borders windows are shifted (arXiv 2403.04690), so the
tiles of keys come with lists of their own. Weights are computed again from the LSE.
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
    load_across,
    load_rows,
    offsets,
    offsets_across,
    store_sums,
    table_of,
    tile_rows,
)


@triton.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "n"])
def queries_kernel(
    q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, n,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, SAME: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """QUERIES: `known` float32 [B, H, n, 2] and grad_q are made; known holds the LSE in base 2, inf where nothing is
    seen, and minus the sum of grad * out and the gradient of the LSE. TABLE: the gradient of the logits, summed over
    the images of a program, goes to grad_table [programs over images, H, tiles, M, N].

    out, grad (equal strides), grad_q: (pointer, strides) as of q. The N keys are taken in so many PIECES. SAME: k and v
    have equal strides and sizes. Other arguments as in `forward_kernel`.
    """
    taint = _queries_program(
        q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
        heads, ratio, images, per, count, groups, n,
        D, DV, WD, WDV, SAME, G, M, N, PIECES, PRECISION, QUERIES, TABLE, False,
    )  # fmt: skip
    if tl.max(tl.where(tl.abs(taint) < INF, 0, 1)) > 0:  # pyright: ignore[reportOperatorIssue]
        _queries_program(
            q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
            heads, ratio, images, per, count, groups, n,
            D, DV, WD, WDV, SAME, G, M, N, PIECES, PRECISION, QUERIES, TABLE, True,
        )  # fmt: skip


@triton.jit
def _queries_program(
    q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, n,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, SAME: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, TABLE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    pid = tl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    chunk = (pid // groups) // heads
    q_token, q_some = tile_rows(q_tokens, group, count, G, M, M)  # pyright: ignore[reportGeneralTypeIssues]
    q_at = offsets(q_some, q[3], q[4], WD)
    o_at, d_at = offsets(q_some, out[3], out[4], WDV), offsets(q_some, grad_q[3], grad_q[4], WD)
    WIDTH: tl.constexpr = N // PIECES
    starts, key_at, values_at, rows_at, sums = (), (), (), (), ()
    for c in tl.static_range(PIECES):  # pyright: ignore[reportGeneralTypeIssues]
        k_token, k_some = tile_rows(k_tokens + c * WIDTH, group, count, G, WIDTH, N)
        start = table_of(masks + c * (WIDTH // 32), group, count, q_token, k_token, h, table, scale, G, M, WIDTH, N)
        starts = starts + (start,)
        key_at = key_at + (offsets_across(k_some, k[3], k[4], WD),)
        values_at = values_at + ((key_at[c] if SAME else offsets_across(k_some, v[3], v[4], WDV)),)
        rows_at = rows_at + (offsets(k_some, k[3], k[4], WD),)
        if TABLE:
            sums = sums + (tl.zeros(start.shape, tl.float32),)
    at = (q_at, o_at, d_at, key_at, values_at, rows_at)
    taint = tl.zeros(q_token.shape, tl.float32)
    for i in range(tl.minimum(per, images - chunk * per)):
        bad, sums = _queries_image(
            q, k, v, out, grad, grad_lse, lse, known, grad_q, at, starts, sums, q_token, q_some, scale,
            (chunk * per + i).to(tl.int64), h, heads, ratio, n,
            D, DV, WD, WDV, PIECES, PRECISION, QUERIES, TABLE, CAREFUL,
        )  # fmt: skip
        taint += bad
    if TABLE:
        for c in tl.static_range(PIECES):  # pyright: ignore[reportGeneralTypeIssues]
            store_sums(grad_table, sums[c], chunk, h, heads, group, count, c * WIDTH, G, M, WIDTH, N)
    return taint


@triton.jit
def _queries_image(
    q, k, v, out, grad, grad_lse, lse, known, grad_q, at, starts, sums, q_token, q_some, scale, image, h, heads,
    ratio, n, D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, TABLE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One image: a sum over each row that is not finite if the row is not, and the sums with this image added."""
    rate = scale * LOG2E
    own = q_token >= 0
    row, head = (image * heads + h) * n, h.to(tl.int64)
    query = load_rows(q[0] + image * q[1] + head * q[2], at[0], D, WD)
    from_k = k[0] + image * k[1] + (h // ratio).to(tl.int64) * k[2]
    from_v = v[0] + image * v[1] + (h // ratio).to(tl.int64) * v[2]
    g = load_rows(grad[0] + image * grad[1] + head * grad[2], at[1], DV, WDV)
    if QUERIES:
        done = load_rows(out[0] + image * out[1] + head * out[2], at[1], DV, WDV)
        end, share = ends(lse + row, grad_lse + row, g, done, q_some)
        tl.store(known + (row + q_token) * 2, end, mask=own)
        tl.store(known + (row + q_token) * 2 + 1, share, mask=own)
    else:
        end = tl.load(known + (row + q_some) * 2)
        share = tl.load(known + (row + q_some) * 2 + 1)
    found = tl.zeros(at[0].shape, tl.float32)
    bad = tl.zeros(q_token.shape, tl.float32)
    added = ()
    for c in tl.static_range(PIECES):  # pyright: ignore[reportGeneralTypeIssues]
        key = load_across(from_k, at[3][c], D, WD)
        values = load_across(from_v, at[4][c], DV, WDV)
        s = tl.dot(query, key, acc=starts[c], input_precision=PRECISION)
        p = tl.exp2(s * rate - tl.expand_dims(end, -1))
        lifted = tl.broadcast_to(tl.expand_dims(share, -1), s.shape)
        ds = p * tl.dot(g, values, acc=lifted, input_precision=PRECISION)
        if CAREFUL:
            ds = tl.where(starts[c] == -INF, 0.0, ds)
        if TABLE:
            added = added + (sums[c] + ds,)
        if QUERIES:
            keys = load_rows(from_k, at[5][c], D, WD)
            if CAREFUL:
                keys = clean(keys)
            found = tl.dot(ds.to(keys.dtype), keys, acc=found, input_precision=PRECISION)
        else:
            bad += tl.sum(ds, -1)
    if QUERIES:
        written = tl.expand_dims(own, -1) & (tl.arange(0, WD) < D)
        to = grad_q[0] + image * grad_q[1] + head * grad_q[2]
        tl.store(to + at[2], (found * scale).to(grad_q[0].dtype.element_ty), mask=written)
        bad = tl.sum(found, -1)
    return bad, added


@triton.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "nq", "nk"])
def keys_kernel(
    q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, SAME: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad, grad_k, grad_v (by query head): (pointer, strides); tiles of M keys and the N queries that see them.

    table is turned: rows are keys. SAME: q has the strides and the size of grad.
    """
    taint = _keys_program(
        q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
        heads, ratio, images, per, count, groups, nq, nk, D, DV, WD, WDV, SAME, G, M, N, PIECES, PRECISION, False,
    )  # fmt: skip
    if tl.max(tl.where(tl.abs(taint) < INF, 0, 1)) > 0:  # pyright: ignore[reportOperatorIssue]
        _keys_program(
            q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
            heads, ratio, images, per, count, groups, nq, nk, D, DV, WD, WDV, SAME, G, M, N, PIECES, PRECISION, True,
        )  # fmt: skip


@triton.jit
def _keys_program(
    q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, SAME: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    pid = tl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    first = (pid // groups) // heads * per
    k_token, k_some = tile_rows(k_tokens, group, count, G, M, M)  # pyright: ignore[reportGeneralTypeIssues]
    k_at, v_at = offsets(k_some, k[3], k[4], WD), offsets(k_some, v[3], v[4], WDV)
    to_k, to_v = offsets(k_some, grad_k[3], grad_k[4], WD), offsets(k_some, grad_v[3], grad_v[4], WDV)
    WIDTH: tl.constexpr = N // PIECES
    starts, query_at, rows_at, grad_at, grad_rows_at, tokens = (), (), (), (), (), ()
    for c in tl.static_range(PIECES):  # pyright: ignore[reportGeneralTypeIssues]
        q_token, q_some = tile_rows(q_tokens + c * WIDTH, group, count, G, WIDTH, N)
        start = table_of(masks + c * (WIDTH // 32), group, count, k_token, q_token, h, table, scale, G, M, WIDTH, N)
        starts = starts + (start,)
        tokens = tokens + (q_some,)
        query_at = query_at + (offsets_across(q_some, q[3], q[4], WD),)
        rows_at = rows_at + (offsets(q_some, q[3], q[4], WD),)
        grad_at = grad_at + ((query_at[c] if SAME else offsets_across(q_some, grad[3], grad[4], WDV)),)
        grad_rows_at = grad_rows_at + ((rows_at[c] if SAME else offsets(q_some, grad[3], grad[4], WDV)),)
    at = (k_at, v_at, to_k, to_v, query_at, rows_at, grad_at, grad_rows_at)
    taint = tl.zeros(k_token.shape, tl.float32)
    for i in range(tl.minimum(per, images - first)):
        taint += _keys_image(
            q, k, v, grad, known, grad_k, grad_v, at, starts, tokens, k_token, scale, (first + i).to(tl.int64), h,
            heads, ratio, nq, nk, D, DV, WD, WDV, PIECES, PRECISION, CAREFUL,
        )  # fmt: skip
    return taint


@triton.jit
def _keys_image(
    q, k, v, grad, known, grad_k, grad_v, at, starts, tokens, k_token, scale, image, h, heads, ratio, nq, nk,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One image; a sum over each row that is not finite if the row is not."""
    rate = scale * LOG2E
    row, head = (image * heads + h) * nq, h.to(tl.int64)
    key = load_rows(k[0] + image * k[1] + (h // ratio).to(tl.int64) * k[2], at[0], D, WD)
    values = load_rows(v[0] + image * v[1] + (h // ratio).to(tl.int64) * v[2], at[1], DV, WDV)
    from_q, from_grad = q[0] + image * q[1] + head * q[2], grad[0] + image * grad[1] + head * grad[2]
    for_k, for_v = tl.zeros(at[0].shape, tl.float32), tl.zeros(at[1].shape, tl.float32)
    for c in tl.static_range(PIECES):  # pyright: ignore[reportGeneralTypeIssues]
        end = tl.load(known + (row + tokens[c]) * 2)
        share = tl.load(known + (row + tokens[c]) * 2 + 1)
        s = tl.dot(key, load_across(from_q, at[4][c], D, WD), acc=starts[c], input_precision=PRECISION)
        p = tl.exp2(s * rate - tl.expand_dims(end, -2))
        g = load_rows(from_grad, at[7][c], DV, WDV)
        weight = p
        if CAREFUL:
            p = tl.where(starts[c] == -INF, 0.0, p)
            weight = tl.where((starts[c] > -INF) & tl.expand_dims(ill_rows(g), -2), float("nan"), p)
            g = clean(g)
        for_v = tl.dot(weight.to(g.dtype), g, acc=for_v, input_precision=PRECISION)
        dp = tl.dot(values, load_across(from_grad, at[6][c], DV, WDV), input_precision=PRECISION)
        ds = p * (dp + tl.expand_dims(share, -2))
        query = load_rows(from_q, at[5][c], D, WD)
        if CAREFUL:
            ds = tl.where(starts[c] == -INF, 0.0, ds)
            query = clean(query)
        for_k = tl.dot(ds.to(query.dtype), query, acc=for_k, input_precision=PRECISION)
    own = tl.expand_dims(k_token >= 0, -1)
    inside = own & (tl.arange(0, WDV) < DV)
    to = grad_v[0] + image * grad_v[1] + head * grad_v[2]
    tl.store(to + at[3], for_v.to(grad_v[0].dtype.element_ty), mask=inside)
    inside = own & (tl.arange(0, WD) < D)
    to = grad_k[0] + image * grad_k[1] + head * grad_k[2]
    tl.store(to + at[2], (for_k * scale).to(grad_k[0].dtype.element_ty), mask=inside)
    return tl.sum(for_k, -1) + tl.sum(for_v, -1)
