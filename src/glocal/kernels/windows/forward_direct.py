"""Forward of window attention with operands read straight into registers (see `direct`); 16-bit numbers, no tables.

As `forward_tiles`, which is the same in Triton and takes the other calls: products batched over tiles, the softmax in
base 2 on whole rows, and a careful second go where keys or values are not finite. What tiles of a program share comes
from the first-level cache, where the keys and values of the next image are fetched while this one is worked on.
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
    ahead,
    along,
    bits_of,
    clean,
    column_offsets,
    hidden,
    ill_rows,
    load_columns,
    load_pairs,
    load_rows,
    operand,
    pair_offsets,
    paired,
    products,
    row_offsets,
    store_rows,
    table_of,
    tokens,
)


@gluon.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "n"])
def forward_kernel(
    q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Arguments as in `forward_tiles.forward_kernel`; table: None. SPLIT: 1, one warp a tile."""
    taint = _program(
        q, k, v, out, lse, q_tokens, k_tokens, masks, scale, heads, ratio, images, per, count, groups, n,
        D, DV, WD, WDV, G, M, N, False,
    )  # fmt: skip
    if gl.max(gl.max(gl.where(gl.abs(taint) < INF, 0, 1), 1), 0) > 0:
        _program(
            q, k, v, out, lse, q_tokens, k_tokens, masks, scale, heads, ratio, images, per, count, groups, n,
            D, DV, WD, WDV, G, M, N, True,
        )  # fmt: skip


@gluon.jit
def _program(
    q, k, v, out, lse, q_tokens, k_tokens, masks, scale, heads, ratio, images, per, count, groups, n,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, CAREFUL: gl.constexpr,
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
    theirs = tokens(k_tokens, group, count, G, N, N, 1, gl.SliceLayout(1, C))[0]
    start = table_of(masks, group, count, mine, theirs, h, None, scale, G, M, N, N, 1)
    q_at = row_offsets(q_tokens, group, count, q, G, M, 1, WD, LEFT)
    k_at = column_offsets(k_tokens, group, count, k, G, N, N, WD, RIGHT)
    v_at = pair_offsets(k_tokens, group, count, v, G, N, N, WDV, paired(G, M, N, WDV))
    if not CAREFUL:
        bits = bits_of(start, G, M, N)
        start = gl.zeros([G, M, N], gl.float32, layout=C)
        FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [G, M // 16], [1, 0])
        around = tokens(k_tokens, group, count, G, N, N, 1, FLAT)[1]
        k_ahead, v_ahead = around * k[3], around * v[3]
    taint = gl.zeros([G, M], gl.float32, layout=gl.SliceLayout(2, C))
    for i in range(gl.minimum(per, images - first)):
        image = (first + i).to(gl.int64)
        rate = scale * LOG2E
        query = load_rows(q[0] + image * q[1] + h.to(gl.int64) * q[2], q_at, D, WD, LEFT)
        key = load_columns(k[0] + image * k[1] + (h // ratio).to(gl.int64) * k[2], k_at, D, WD, RIGHT)
        values = load_pairs(v[0] + image * v[1] + (h // ratio).to(gl.int64) * v[2], v_at, DV, WDV, G, M, N)
        if not CAREFUL:  # noqa: SIM102 - known when compiled
            if i + 1 < gl.minimum(per, images - first):
                ahead(k[0] + (image + 1) * k[1] + (h // ratio).to(gl.int64) * k[2], k_ahead)
                ahead(v[0] + (image + 1) * v[1] + (h // ratio).to(gl.int64) * v[2], v_ahead)
        s = mma_v2(query, key, start)
        if CAREFUL:
            s = gl.where(start == -INF, -INF, s)
        else:
            s = hidden(s, bits, G, M, N)
        top = gl.max(s, 2)
        shift = gl.where(top == -INF, 0.0, top)
        p = gl.exp2(s * rate - gl.expand_dims(shift * rate, 2))
        total = gl.sum(p, 2)
        if CAREFUL:
            ill = gl.convert_layout(ill_rows(values), gl.SliceLayout(1, C))
            p = gl.where((start > -INF) & (gl.expand_dims(ill, 1) > 0), float("nan"), p)
            values = clean(values)
        p = gl.convert_layout(p.to(values.dtype), operand(0, G, M, 2))
        found = mma_v2(p, values, gl.zeros([G, M, WDV], gl.float32, layout=C))
        found = found * gl.expand_dims(1.0 / gl.where(total == 0, 1.0, total), 2)
        row = (image * heads + h) * n
        store_rows(out, found, q_tokens, group, count, row * DV, DV, WDV, G, M, 1)
        gl.store(lse + row + mine, shift * scale + gl.log(total), mask=mine >= 0)
        taint += gl.sum(found, 2)
    return taint
