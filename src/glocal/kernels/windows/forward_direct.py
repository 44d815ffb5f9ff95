"""Forward of window attention with operands read straight into registers (see `direct`); 16-bit numbers.

As `forward_tiles`, which is the same in Triton and takes the other calls: products batched over tiles, the softmax in
base 2, and a careful second go where keys or values are not finite.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from glocal.kernels.windows.direct import (
    INF,
    LN2,
    LOG2E,
    along,
    clean,
    ill_columns,
    load_both,
    load_rows,
    logits,
    operand,
    piece_of,
    pieces_of,
    products,
    quick,
    row_offsets,
    settled,
    store_rows,
    tokens,
    turned,
)


@gluon.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "n"])
def forward_kernel(
    q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ALL: gl.constexpr, PIECES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Arguments as in `forward_tiles.forward_kernel`; a warp takes PIECES of N of the ALL keys of a tile. SPLIT: 1."""
    taint = _program(
        q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
        D, DV, WD, WDV, G, M, N, ALL, PIECES, False,
    )  # fmt: skip
    if gl.max(gl.max(gl.where(gl.abs(taint) < INF, 0, 1), 1), 0) > 0:
        _program(
            q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
            D, DV, WD, WDV, G, M, N, ALL, PIECES, True,
        )  # fmt: skip


@gluon.jit
def _program(
    q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ALL: gl.constexpr, PIECES: gl.constexpr,
    CAREFUL: gl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    C: gl.constexpr = products(G, M)
    LEFT: gl.constexpr = operand(0, G, M, along(WD))
    RIGHT: gl.constexpr = operand(1, G, M, along(WD))
    pid = gl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    first = (pid // groups) // heads * per
    mine = tokens(q_tokens, group, count, G, M, M, 1, gl.SliceLayout(2, C))[0]
    if not CAREFUL:
        seen, places = pieces_of(
            q_tokens, k_tokens, masks, group, count, h, table, scale, RIGHT, G, M, N, ALL, PIECES, 1, table is None
        )
    q_at = row_offsets(q_tokens, group, count, q, G, M, 1, WD, LEFT)
    from_q = q[0] + h.to(gl.int64) * q[2]
    from_k, from_v = k[0] + (h // ratio).to(gl.int64) * k[2], v[0] + (h // ratio).to(gl.int64) * v[2]
    rate = scale * LOG2E
    taint = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
    for i in range(gl.minimum(per, images - first)):
        image = (first + i).to(gl.int64)
        query = settled(load_rows(from_q + image * q[1], q_at, D, WD, LEFT), per >> 30)
        top = gl.full([G, M], -INF, gl.float32, layout=gl.SliceLayout(2, C))
        total = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
        found = gl.zeros([G, M, WDV], gl.float32, layout=C)
        keys, values = (from_k + image * k[1], k[3], k[4]), (from_v + image * v[1], v[3], v[4])
        if CAREFUL:
            for c in range(PIECES):
                start, place = piece_of(
                    c, q_tokens, k_tokens, masks, group, count, h, table, scale, RIGHT, G, M, N, ALL, 1
                )  # fmt: skip
                top, total, found = _piece(
                    query, keys, values, start, place, i, top, total, found, rate, D, DV, WD, WDV, G, M, N, False, True
                )
        else:
            for c in gl.static_range(PIECES):
                top, total, found = _piece(
                    query, keys, values, seen[c], places[c], i, top, total, found, rate,
                    D, DV, WD, WDV, G, M, N, c == 0, False,
                )  # fmt: skip
        found = found * gl.expand_dims(quick(gl.where(total == 0, 1.0, total), "rcp"), 2)
        row = (image * heads + h) * n
        store_rows(out, found, q_tokens, group, count, image, h, DV, WDV, G, M, 1)
        gl.store(lse + row + mine, gl.where(top == -INF, 0.0, top) * scale + quick(total, "lg2") * LN2, mask=mine >= 0)
        taint += gl.sum(found, 2)
    return taint


@gluon.jit
def _piece(
    query, k, v, seen, place, i, top, total, found, rate,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr, G: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, FIRST: gl.constexpr, CAREFUL: gl.constexpr,
):  # fmt: skip
    """A running softmax with N keys more: largest logits and sums of weights [G, M], sums of values [G, M, WDV]."""
    key, values = load_both(k, v, place, i, D, DV, WD, WDV, G, M)
    s = logits(query, key, seen, G, M, N)
    if CAREFUL:
        s = gl.where(seen == -INF, -INF, s)
    before, top = top, gl.maximum(top, gl.max(s, 2))
    shift = gl.where(top == -INF, 0.0, top)
    p = gl.exp2(s * rate - gl.expand_dims(shift * rate, 2))
    if not FIRST:
        fade = gl.exp2((before - shift) * rate)
        total, found = total * fade, found * gl.expand_dims(fade, 2)
    total += gl.sum(p, 2)
    if CAREFUL:
        ill = gl.convert_layout(ill_columns(values), gl.SliceLayout(1, products(G, M)))
        p = gl.where((seen > -INF) & (gl.expand_dims(ill, 1) > 0), float("nan"), p)
        values = clean(values)
    p = gl.convert_layout(p.to(values.dtype), operand(0, G, M, 2))
    return top, total, mma_v2(p, turned(values, G, M, N, WDV), found)
