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
    across,
    ahead,
    along,
    bits_of,
    clean,
    fresh,
    hidden,
    ill_rows,
    in_pairs,
    load_columns,
    load_pairs,
    load_rows,
    operand,
    over_columns,
    over_pairs,
    paired,
    products,
    row_offsets,
    settled,
    store_rows,
    table_of,
    tokens,
    twos,
)


@gluon.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "n"])
def queries_kernel(
    q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr, SAME: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr, PIECES: gl.constexpr,
    QUERIES: gl.constexpr, TABLE: gl.constexpr, WORDS: gl.constexpr, AHEAD: gl.constexpr, SETTLE: gl.constexpr,
):  # fmt: skip
    """Arguments as in `backward_tiles.queries_kernel`; the tiles have SPLIT times N keys."""
    taint = _queries_program(
        q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
        heads, ratio, images, per, count, groups, n,
        D, DV, WD, WDV, SAME, G, M, N, SPLIT, PIECES, QUERIES, TABLE, WORDS, AHEAD, SETTLE, False,
    )  # fmt: skip
    if gl.max(gl.max(gl.where(gl.abs(taint) < INF, 0, 1), 1), 0) > 0:
        _queries_program(
            q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
            heads, ratio, images, per, count, groups, n,
            D, DV, WD, WDV, SAME, G, M, N, SPLIT, PIECES, QUERIES, TABLE, False, False, False, True,
        )  # fmt: skip


@gluon.jit
def _queries_program(
    q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr, SAME: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr, PIECES: gl.constexpr,
    QUERIES: gl.constexpr, TABLE: gl.constexpr, WORDS: gl.constexpr, AHEAD: gl.constexpr, SETTLE: gl.constexpr, CAREFUL: gl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    C: gl.constexpr = products(G, M)
    LEFT: gl.constexpr = operand(0, G, M, along(WD))
    RIGHT: gl.constexpr = operand(1, G, M, along(WD))
    LEFT_V: gl.constexpr = operand(0, G, M, along(WDV))
    RIGHT_V: gl.constexpr = operand(1, G, M, along(WDV))
    WIDTH: gl.constexpr = N // PIECES
    pid = gl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    chunk = (pid // groups) // heads
    mine, some = tokens(q_tokens, group, count, G, M, M, SPLIT, gl.SliceLayout(2, C))
    own = mine >= 0
    q_at = row_offsets(q_tokens, group, count, q, G, M, SPLIT, WD, LEFT)
    o_at = row_offsets(q_tokens, group, count, (out, 0, 0, DV, 1), G, M, SPLIT, WDV, LEFT_V)
    PAIRED: gl.constexpr = paired(G, M, WIDTH, WD)
    starts, columns_at, pairs_at, sums = (), (), (), ()
    for c in gl.static_range(PIECES):
        part = k_tokens + c * WIDTH
        theirs = tokens(part, group, count * SPLIT, G, WIDTH, N, 1, gl.SliceLayout(1, C))[0]
        start = table_of(masks + c * (WIDTH // 32), group, count, mine, theirs, h, table, scale, G, M, WIDTH, N, SPLIT)
        starts = starts + (bits_of(start, G, M, WIDTH) if WORDS else start,)
        columns_at = columns_at + (tokens(part, group, count * SPLIT, G, WIDTH, N, 1, over_columns(RIGHT))[1],)
        pairs_at = pairs_at + (tokens(part, group, count * SPLIT, G, WIDTH, N, 1, over_pairs(PAIRED))[1],)
        if TABLE:
            sums = sums + (gl.zeros([G, M, WIDTH], gl.float32, layout=C),)
    if AHEAD:
        FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [G, M // 16], [1, 0])
        around = tokens(k_tokens, group, count * SPLIT, G, N, N, 1, FLAT)[1]
        k_ahead, v_ahead = around * k[3], around * v[3]
    taint = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
    for i in range(gl.minimum(per, images - chunk * per)):
        image = (chunk * per + i).to(gl.int64)
        rate = scale * LOG2E
        row = (image * heads + h) * n
        query = load_rows(q[0] + image * q[1] + h.to(gl.int64) * q[2], q_at, D, WD, LEFT)
        from_k = k[0] + image * k[1] + (h // ratio).to(gl.int64) * k[2]
        from_v = v[0] + image * v[1] + (h // ratio).to(gl.int64) * v[2]
        g = load_rows(grad + row * DV, o_at, DV, WDV, LEFT_V)
        if AHEAD and i + 1 < gl.minimum(per, images - chunk * per):
            ahead(from_k + k[1], k_ahead)
            ahead(from_v + v[1], v_ahead)
        if SETTLE:
            query = settled(query, per >> 30)
        if QUERIES:
            end = gl.load(lse + row + some)
            empty = end == -INF
            end = gl.where(empty, INF, end * LOG2E)
            share = gl.where(empty, 0.0, gl.load(grad_lse + row + some))
            done = load_rows(out + row * DV, o_at, DV, WDV, LEFT_V)
            delta = gl.sum(g.to(gl.float32) * done.to(gl.float32), 2)
            share -= gl.convert_layout(delta, gl.SliceLayout(2, C))
            gl.store(known + (row + mine) * 2, end, mask=own)
            gl.store(known + (row + mine) * 2 + 1, share, mask=own)
        else:
            end = gl.load(known + (row + some) * 2)
            share = gl.load(known + (row + some) * 2 + 1)
        if SETTLE:
            g = settled(g, per >> 30)
        found = gl.zeros([G, M, WD], gl.float32, layout=C)
        bad = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
        added = ()
        for c in gl.static_range(PIECES):
            key_at = fresh(columns_at[c], i)
            key = load_columns(from_k, across(key_at, k, WD, RIGHT), D, WD, RIGHT)
            value_at = gl.convert_layout(key_at, over_columns(RIGHT_V), assert_trivial=True)
            values = load_columns(from_v, across(value_at, v, WDV, RIGHT_V), DV, WDV, RIGHT_V)
            if WORDS:
                s = mma_v2(query, key, gl.zeros([G, M, WIDTH], gl.float32, layout=C))
                s = hidden(s, starts[c], G, M, WIDTH)
            else:
                s = mma_v2(query, key, starts[c])
            p = gl.exp2(s * rate - gl.expand_dims(end, 2))
            lifted = gl.expand_dims(share, 2) + gl.zeros([G, M, WIDTH], gl.float32, layout=C)
            ds = p * mma_v2(g, values, lifted)
            if CAREFUL:
                ds = gl.where(starts[c] == -INF, 0.0, ds)
            if TABLE:
                added = added + (sums[c] + ds,)
            if QUERIES:
                keys = load_pairs(from_k, in_pairs(fresh(pairs_at[c], i), k, WD, PAIRED), D, WD, G, M, WIDTH)
                if CAREFUL:
                    keys = clean(keys)
                found = mma_v2(gl.convert_layout(ds.to(keys.dtype), operand(0, G, M, 2)), keys, found)
            else:
                bad += gl.sum(ds, 2)
        if TABLE:
            sums = added
        if QUERIES:
            store_rows(grad_q, found * scale, q_tokens, group, count, row * D, D, WD, G, M, SPLIT)
            bad += gl.sum(found, 2)
        taint += bad
    if TABLE:
        place = (chunk * heads + h).to(gl.int64) * count * (M * N * SPLIT)
        turn = group * G + gl.arange(0, G, layout=gl.SliceLayout(1, gl.SliceLayout(2, C)))
        turn = gl.expand_dims(gl.expand_dims(turn, 1), 2)
        line = turn // SPLIT * M + gl.expand_dims(
            gl.expand_dims(gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, C))), 0), 2
        )
        column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, C)))
        at = line * (N * SPLIT) + turn % SPLIT * N + gl.expand_dims(gl.expand_dims(column, 0), 1)
        for c in gl.static_range(PIECES):
            gl.store(grad_table + place + c * WIDTH + at, sums[c], mask=turn // SPLIT < count)
    return taint


@gluon.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "nq", "nk"])
def keys_kernel(
    q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr, SAME: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr, PIECES: gl.constexpr,
    WORDS: gl.constexpr, AHEAD: gl.constexpr, SETTLE: gl.constexpr,
):  # fmt: skip
    """Arguments as in `backward_tiles.keys_kernel`; the tiles have SPLIT times N queries."""
    taint = _keys_program(
        q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
        heads, ratio, images, per, count, groups, nq, nk, D, DV, WD, WDV, SAME, G, M, N, SPLIT, PIECES, WORDS, AHEAD, SETTLE, False,
    )  # fmt: skip
    if gl.max(gl.max(gl.where(gl.abs(taint) < INF, 0, 1), 1), 0) > 0:
        _keys_program(
            q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
            heads, ratio, images, per, count, groups, nq, nk, D, DV, WD, WDV, SAME, G, M, N, SPLIT, PIECES, False, False, False, True,
        )  # fmt: skip


@gluon.jit
def _keys_program(
    q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr, SAME: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr, PIECES: gl.constexpr,
    WORDS: gl.constexpr, AHEAD: gl.constexpr, SETTLE: gl.constexpr, CAREFUL: gl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    C: gl.constexpr = products(G, M)
    LEFT: gl.constexpr = operand(0, G, M, along(WD))
    RIGHT: gl.constexpr = operand(1, G, M, along(WD))
    LEFT_V: gl.constexpr = operand(0, G, M, along(WDV))
    RIGHT_V: gl.constexpr = operand(1, G, M, along(WDV))
    WIDTH: gl.constexpr = N // PIECES
    TWOS: gl.constexpr = twos(G, M, WIDTH)
    pid = gl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    first = (pid // groups) // heads * per
    mine = tokens(k_tokens, group, count, G, M, M, SPLIT, gl.SliceLayout(2, C))[0]
    k_at = row_offsets(k_tokens, group, count, k, G, M, SPLIT, WD, LEFT)
    v_at = row_offsets(k_tokens, group, count, v, G, M, SPLIT, WDV, LEFT_V)
    PAIRED: gl.constexpr = paired(G, M, WIDTH, WD)
    PAIRED_V: gl.constexpr = paired(G, M, WIDTH, WDV)
    starts, columns_at, pairs_at = (), (), ()
    for c in gl.static_range(PIECES):
        part = q_tokens + c * WIDTH
        theirs = tokens(part, group, count * SPLIT, G, WIDTH, N, 1, gl.SliceLayout(1, C))[0]
        start = table_of(masks + c * (WIDTH // 32), group, count, mine, theirs, h, table, scale, G, M, WIDTH, N, SPLIT)
        starts = starts + (bits_of(start, G, M, WIDTH) if WORDS else start,)
        columns_at = columns_at + (tokens(part, group, count * SPLIT, G, WIDTH, N, 1, over_columns(RIGHT))[1],)
        pairs_at = pairs_at + (tokens(part, group, count * SPLIT, G, WIDTH, N, 1, over_pairs(PAIRED))[1],)
    if AHEAD:
        FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [G, M // 16], [1, 0])
        around = tokens(q_tokens, group, count * SPLIT, G, N, N, 1, FLAT)[1]
        q_ahead, grad_ahead = around * q[3], around * DV
    taint = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
    for i in range(gl.minimum(per, images - first)):
        image = (first + i).to(gl.int64)
        rate = scale * LOG2E
        row, place = (image * heads + h) * nq, (image * heads + h) * nk
        key = load_rows(k[0] + image * k[1] + (h // ratio).to(gl.int64) * k[2], k_at, D, WD, LEFT)
        values = load_rows(v[0] + image * v[1] + (h // ratio).to(gl.int64) * v[2], v_at, DV, WDV, LEFT_V)
        from_q = q[0] + image * q[1] + h.to(gl.int64) * q[2]
        if AHEAD and i + 1 < gl.minimum(per, images - first):
            ahead(from_q + q[1], q_ahead)
            ahead(grad + row * DV + heads.to(gl.int64) * nq * DV, grad_ahead)
        if SETTLE:
            key = settled(key, per >> 30)
            values = settled(values, per >> 30)
        for_k = gl.zeros([G, M, WD], gl.float32, layout=C)
        for_v = gl.zeros([G, M, WDV], gl.float32, layout=C)
        for c in gl.static_range(PIECES):
            across_at, pair_at = fresh(columns_at[c], i), fresh(pairs_at[c], i)
            side = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(0, TWOS)))
            end_at = gl.expand_dims(gl.convert_layout(pair_at, gl.SliceLayout(2, TWOS), assert_trivial=True), 2) * 2
            end_at += gl.expand_dims(gl.expand_dims(side, 0), 0)
            end, share = gl.split(gl.load(known + row * 2 + end_at))
            end = gl.convert_layout(end, gl.SliceLayout(1, C), assert_trivial=True)
            share = gl.convert_layout(share, gl.SliceLayout(1, C), assert_trivial=True)
            query = load_columns(from_q, across(across_at, q, WD, RIGHT), D, WD, RIGHT)
            if WORDS:
                s = mma_v2(key, query, gl.zeros([G, M, WIDTH], gl.float32, layout=C))
                s = hidden(s, starts[c], G, M, WIDTH)
            else:
                s = mma_v2(key, query, starts[c])
            p = gl.exp2(s * rate - gl.expand_dims(end, 1))
            grad_pair_at = gl.convert_layout(pair_at, over_pairs(PAIRED_V), assert_trivial=True)
            g = load_pairs(grad + row * DV, in_pairs(grad_pair_at, (grad, 0, 0, DV, 1), WDV, PAIRED_V), DV, WDV, G, M, WIDTH)
            weight = p
            if CAREFUL:
                p = gl.where(starts[c] == -INF, 0.0, p)
                ill = gl.convert_layout(ill_rows(g), gl.SliceLayout(1, C))
                weight = gl.where((starts[c] > -INF) & (gl.expand_dims(ill, 1) > 0), float("nan"), p)
                g = clean(g)
            for_v = mma_v2(gl.convert_layout(weight.to(g.dtype), operand(0, G, M, 2)), g, for_v)
            lifted = gl.expand_dims(share, 1) + gl.zeros([G, M, WIDTH], gl.float32, layout=C)
            grad_at = across(
                gl.convert_layout(across_at, over_columns(RIGHT_V), assert_trivial=True), (grad, 0, 0, DV, 1), WDV, RIGHT_V
            )
            ds = p * mma_v2(values, load_columns(grad + row * DV, grad_at, DV, WDV, RIGHT_V), lifted)
            query = load_pairs(from_q, in_pairs(pair_at, q, WD, PAIRED), D, WD, G, M, WIDTH)
            if CAREFUL:
                ds = gl.where(starts[c] == -INF, 0.0, ds)
                query = clean(query)
            for_k = mma_v2(gl.convert_layout(ds.to(query.dtype), operand(0, G, M, 2)), query, for_k)
        store_rows(grad_v, for_v, k_tokens, group, count, place * DV, DV, WDV, G, M, SPLIT)
        store_rows(grad_k, for_k * scale, k_tokens, group, count, place * D, D, WD, G, M, SPLIT)
        taint += gl.sum(for_k, 2) + gl.sum(for_v, 2)
    return taint
