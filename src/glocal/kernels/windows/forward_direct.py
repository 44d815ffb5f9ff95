"""Forward of window attention with operands read straight into registers (see `direct`); 16-bit numbers.

As `forward_tiles`, which is the same in Triton and takes the other calls: products batched over tiles, the softmax in
base 2 on whole rows, and a careful second go where keys or values are not finite.
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
    fresh,
    clean,
    hidden,
    ill_rows,
    in_pairs,
    load_columns,
    load_pairs,
    load_rows,
    operand,
    over_columns,
    over_pairs,
    over_parts,
    paired,
    products,
    row_offsets,
    settled,
    store_rows,
    table_of,
    tokens,
)


@gluon.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "n"])
def forward_kernel(
    q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr,
    WORDS: gl.constexpr, AHEAD: gl.constexpr, CARRY: gl.constexpr, FRESH: gl.constexpr, SETTLE: gl.constexpr,
):  # fmt: skip
    """Arguments as in `forward_tiles.forward_kernel`; the tiles have SPLIT times N keys."""
    taint = _program(
        q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
        D, DV, WD, WDV, G, M, N, SPLIT, WORDS, AHEAD, CARRY, FRESH, SETTLE, False,
    )  # fmt: skip
    if gl.max(gl.max(gl.where(gl.abs(taint) < INF, 0, 1), 1), 0) > 0:
        _program(
            q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
            D, DV, WD, WDV, G, M, N, SPLIT, False, False, False, FRESH, False, True,
        )  # fmt: skip


@gluon.jit
def _program(
    q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr, WORDS: gl.constexpr, AHEAD: gl.constexpr,
    CARRY: gl.constexpr, FRESH: gl.constexpr, SETTLE: gl.constexpr, CAREFUL: gl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    C: gl.constexpr = products(G, M)
    LEFT: gl.constexpr = operand(0, G, M, along(WD))
    RIGHT: gl.constexpr = operand(1, G, M, along(WD))
    pid = gl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    first = (pid // groups) // heads * per
    mine = tokens(q_tokens, group, count, G, M, M, SPLIT, gl.SliceLayout(2, C))[0]
    theirs = tokens(k_tokens, group, count * SPLIT, G, N, N, 1, gl.SliceLayout(1, C))[0]
    start = table_of(masks, group, count, mine, theirs, h, table, scale, G, M, N, N, SPLIT)
    q_at = row_offsets(q_tokens, group, count, q, G, M, SPLIT, WD, LEFT)
    PAIRED: gl.constexpr = paired(G, M, N, WDV)
    columns_at = tokens(k_tokens, group, count * SPLIT, G, N, N, 1, over_columns(RIGHT))[1]
    pairs_at = tokens(k_tokens, group, count * SPLIT, G, N, N, 1, over_pairs(PAIRED))[1]
    if WORDS:
        bits = bits_of(start, G, M, N)
        start = gl.zeros([G, M, N], gl.float32, layout=C)
    if AHEAD > 0:
        FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [G, M // 16], [1, 0])
        around = tokens(k_tokens, group, count * SPLIT, G, N, N, 1, FLAT)[1]
        k_ahead, v_ahead = around * k[3], around * v[3]
    taint = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
    count_here = gl.minimum(per, images - first)
    if CARRY:
        image = first.to(gl.int64)
        query = load_rows(q[0] + image * q[1] + h.to(gl.int64) * q[2], q_at, D, WD, LEFT)
        from_k = k[0] + image * k[1] + (h // ratio).to(gl.int64) * k[2]
        key = load_columns(from_k, across(columns_at, k, WD, RIGHT), D, WD, RIGHT)
    for i in range(count_here):
        image = (first + i).to(gl.int64)
        rate = scale * LOG2E
        from_v = v[0] + image * v[1] + (h // ratio).to(gl.int64) * v[2]
        from_k = k[0] + image * k[1] + (h // ratio).to(gl.int64) * k[2]
        if not CARRY:
            query = load_rows(q[0] + image * q[1] + h.to(gl.int64) * q[2], q_at, D, WD, LEFT)
            key = load_columns(from_k, across(fresh(columns_at, i) if FRESH else columns_at, k, WD, RIGHT), D, WD, RIGHT)
        values = load_pairs(from_v, in_pairs(fresh(pairs_at, i) if FRESH else pairs_at, v, WDV, PAIRED), DV, WDV, G, M, N)
        if AHEAD > 0 and i + 1 < count_here:
            ahead(from_k + k[1], k_ahead, AHEAD)
            ahead(from_v + v[1], v_ahead, AHEAD)
        if SETTLE:
            query = settled(query, per >> 30)
        s = mma_v2(query, key, start)
        if WORDS:
            s = hidden(s, bits, G, M, N)
        if CARRY:
            coming = (first + gl.minimum(i + 1, count_here - 1)).to(gl.int64)
            query = load_rows(q[0] + coming * q[1] + h.to(gl.int64) * q[2], q_at, D, WD, LEFT)
            from_k = k[0] + coming * k[1] + (h // ratio).to(gl.int64) * k[2]
            key = load_columns(from_k, across(fresh(columns_at, i) if FRESH else columns_at, k, WD, RIGHT), D, WD, RIGHT)
        if CAREFUL:
            s = gl.where(start == -INF, -INF, s)
        top = over_parts(gl.max(s, 2), True, G, M, SPLIT)
        shift = gl.where(top == -INF, 0.0, top)
        p = gl.exp2(s * rate - gl.expand_dims(shift * rate, 2))
        total = over_parts(gl.sum(p, 2), False, G, M, SPLIT)
        if CAREFUL:
            ill = gl.convert_layout(ill_rows(values), gl.SliceLayout(1, C))
            p = gl.where((start > -INF) & (gl.expand_dims(ill, 1) > 0), float("nan"), p)
            values = clean(values)
        p = gl.convert_layout(p.to(values.dtype), operand(0, G, M, 2))
        found = mma_v2(p, values, gl.zeros([G, M, WDV], gl.float32, layout=C))
        found = found * gl.expand_dims(1.0 / gl.where(total == 0, 1.0, total), 2)
        row = (image * heads + h) * n
        store_rows(out, found, q_tokens, group, count, row * DV, DV, WDV, G, M, SPLIT)
        gl.store(lse + row + mine, shift * scale + gl.log(total), mask=mine >= 0)
        taint += gl.sum(found, 2)
    return taint
