"""Backward of window attention, without atomics: queries gather from their keys, keys from the queries that see them.

The set of queries that see a key is not its neighbourhood: at borders windows are shifted (arXiv 2403.04690), so the
tiles of keys come with lists of their own. Weights are computed again from the LSE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.windows.forward_tiles import LOG2E
from glocal.kernels.windows.tile import INF, load_across, load_rows, offsets, offsets_across, table_of, tile_rows


@triton.jit
def queries_kernel(
    q, k, v, out, grad, grad_lse, lse, known, grad_q, grad_table, q_tokens, k_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, n,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """QUERIES: `known` float32 [B, H, n, 2] and grad_q [B, H, n, D] are made; known holds the LSE in base 2, inf where
    nothing is seen, and minus the sum of grad * out and the gradient of the LSE. TABLE: the gradient of the logits,
    summed over the images of a program, goes to grad_table [programs over images, H, tiles, M, N].

    out, grad: contiguous [B, H, n, DV]. Other arguments as in `forward_kernel`.
    """
    pid = tl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    chunk = (pid // groups) // heads
    q_token, q_some = tile_rows(q_tokens, group, count, G, M)
    k_token, k_some = tile_rows(k_tokens, group, count, G, N)
    start = table_of(masks, group, count, q_token, k_token, h, table, scale, G, M, N)
    own = q_token >= 0
    q_at, k_at = offsets(q_some, q[3], q[4], WD), offsets_across(k_some, k[3], k[4], WD)
    r_at, v_at = offsets(k_some, k[3], k[4], WD), offsets_across(k_some, v[3], v[4], WDV)
    o_at, d_at = offsets(q_some, DV, 1, WDV), offsets(q_some, D, 1, WD)
    written = tl.expand_dims(own, -1) & (tl.arange(0, WD) < D)
    rate = scale * LOG2E
    summed = tl.zeros(start.shape, tl.float32)
    for i in range(tl.minimum(per, images - chunk * per)):
        image = (chunk * per + i).to(tl.int64)
        row = (image * heads + h) * n
        query = load_rows(q[0] + image * q[1] + h.to(tl.int64) * q[2], q_at, D, WD)
        from_k = k[0] + image * k[1] + (h // ratio).to(tl.int64) * k[2]
        key = load_across(from_k, k_at, D, WD)
        values = load_across(v[0] + image * v[1] + (h // ratio).to(tl.int64) * v[2], v_at, DV, WDV)
        g = load_rows(grad + row * DV, o_at, DV, WDV)
        if QUERIES:
            end = tl.load(lse + row + q_some)
            empty = end == -INF
            end = tl.where(empty, INF, end * LOG2E)
            share = tl.where(empty, 0.0, tl.load(grad_lse + row + q_some))
            share -= tl.sum(g.to(tl.float32) * load_rows(out + row * DV, o_at, DV, WDV).to(tl.float32), -1)
            tl.store(known + (row + q_token) * 2, end, mask=own)
            tl.store(known + (row + q_token) * 2 + 1, share, mask=own)
        else:
            end = tl.load(known + (row + q_some) * 2)
            share = tl.load(known + (row + q_some) * 2 + 1)
        s = tl.dot(query, key, acc=start, input_precision=PRECISION)
        p = tl.exp2(s * rate - tl.expand_dims(end, -1))
        lifted = tl.broadcast_to(tl.expand_dims(share, -1), start.shape)
        ds = p * tl.dot(g, values, acc=lifted, input_precision=PRECISION)
        if TABLE:
            summed += ds
        if QUERIES:
            keys = load_rows(from_k, r_at, D, WD)
            found = tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION) * scale
            tl.store(grad_q + row * D + d_at, found.to(grad_q.dtype.element_ty), mask=written)
    if TABLE:
        place = ((chunk * heads + h).to(tl.int64) * count + group * G) * (M * N)
        at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)
        if G == 1:
            tl.store(grad_table + place + at, summed)
        else:
            tile = tl.arange(0, G)[:, None, None]
            tl.store(grad_table + place + tile * (M * N) + at, summed, mask=group * G + tile < count)


@triton.jit
def keys_kernel(
    q, k, v, grad, known, grad_k, grad_v, k_tokens, q_tokens, masks, table, scale,
    heads, ratio, images, per, count, groups, nq, nk,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k [B, H, nk, D] and grad_v [B, H, nk, DV] by query head; tiles of M keys and the N queries that see them.

    bias and table are turned: rows are keys.
    """
    pid = tl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    first = (pid // groups) // heads * per
    k_token, k_some = tile_rows(k_tokens, group, count, G, M)
    q_token, q_some = tile_rows(q_tokens, group, count, G, N)
    start = table_of(masks, group, count, k_token, q_token, h, table, scale, G, M, N)
    k_at, v_at = offsets(k_some, k[3], k[4], WD), offsets(k_some, v[3], v[4], WDV)
    q_at, r_at = offsets_across(q_some, q[3], q[4], WD), offsets(q_some, q[3], q[4], WD)
    g_at, s_at = offsets_across(q_some, DV, 1, WDV), offsets(q_some, DV, 1, WDV)
    to_k, to_v = offsets(k_some, D, 1, WD), offsets(k_some, DV, 1, WDV)
    own = tl.expand_dims(k_token >= 0, -1)
    rate = scale * LOG2E
    for i in range(tl.minimum(per, images - first)):
        image = (first + i).to(tl.int64)
        row = (image * heads + h) * nq
        key = load_rows(k[0] + image * k[1] + (h // ratio).to(tl.int64) * k[2], k_at, D, WD)
        values = load_rows(v[0] + image * v[1] + (h // ratio).to(tl.int64) * v[2], v_at, DV, WDV)
        from_q = q[0] + image * q[1] + h.to(tl.int64) * q[2]
        end = tl.load(known + (row + q_some) * 2)
        share = tl.load(known + (row + q_some) * 2 + 1)
        s = tl.dot(key, load_across(from_q, q_at, D, WD), acc=start, input_precision=PRECISION)
        p = tl.exp2(s * rate - tl.expand_dims(end, -2))
        g = load_rows(grad + row * DV, s_at, DV, WDV)
        found = tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
        place = (image * heads + h) * nk
        inside = own & (tl.arange(0, WDV) < DV)
        tl.store(grad_v + place * DV + to_v, found.to(grad_v.dtype.element_ty), mask=inside)
        dp = tl.dot(values, load_across(grad + row * DV, g_at, DV, WDV), input_precision=PRECISION)
        ds = p * (dp + tl.expand_dims(share, -2))
        query = load_rows(from_q, r_at, D, WD)
        found = tl.dot(ds.to(query.dtype), query, input_precision=PRECISION) * scale
        inside = own & (tl.arange(0, WD) < D)
        tl.store(grad_k + place * D + to_k, found.to(grad_k.dtype.element_ty), mask=inside)
