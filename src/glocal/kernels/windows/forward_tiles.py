"""Forward of window attention: each program reads its queries and their keys once an image (arXiv 2403.04690).

The products are batched over G tiles, the softmax runs in base 2 on whole rows, so nothing is ever rescaled. Keys and
values that are not finite must not reach rows that do not see them: a program that meets any in its results goes over
its images once more, carefully.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.windows.tile import (
    INF,
    LOG2E,
    clean,
    ill_rows,
    load_across,
    load_rows,
    offsets,
    offsets_across,
    table_of,
    tile_rows,
)


@triton.jit(do_not_specialize=["heads", "ratio", "images", "per", "count", "groups", "n"])
def forward_kernel(
    q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, v, out: (pointer, strides of image, head, token, column); lse float32 [B, H, n].

    q_tokens [count, M], k_tokens [count, N], masks: the tiles of this launch, in groups of G. ratio: query heads a key
    head. per: images a program.
    """
    taint = _program(
        q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
        D, DV, WD, WDV, G, M, N, PRECISION, False,
    )  # fmt: skip
    if tl.max(tl.where(tl.abs(taint) < INF, 0, 1)) > 0:  # pyright: ignore[reportOperatorIssue]
        _program(
            q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
            D, DV, WD, WDV, G, M, N, PRECISION, True,
        )  # fmt: skip


@triton.jit
def _program(
    q, k, v, out, lse, q_tokens, k_tokens, masks, table, scale, heads, ratio, images, per, count, groups, n,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """All images of a program; [G, M], not finite for a row that was not in some image."""
    pid = tl.program_id(0)
    group = pid % groups
    h = (pid // groups) % heads
    first = (pid // groups) // heads * per
    q_token, q_some = tile_rows(q_tokens, group, count, G, M, M)  # pyright: ignore[reportGeneralTypeIssues]
    k_token, k_some = tile_rows(k_tokens, group, count, G, N, N)
    start = table_of(masks, group, count, q_token, k_token, h, table, scale, G, M, N, N)
    at = (
        offsets(q_some, q[3], q[4], WD), offsets_across(k_some, k[3], k[4], WD),
        offsets(k_some, v[3], v[4], WDV), offsets(q_some, out[3], out[4], WDV),
    )  # fmt: skip
    taint = tl.zeros(q_token.shape, tl.float32)
    for i in range(tl.minimum(per, images - first)):
        taint += _image(
            q, k, v, out, lse, at, start, q_token, scale, (first + i).to(tl.int64), h, heads, ratio, n,
            D, DV, WD, WDV, PRECISION, CAREFUL,
        )  # fmt: skip
    return taint


@triton.jit
def _image(
    q, k, v, out, lse, at, start, q_token, scale, image, h, heads, ratio, n,
    D: tl.constexpr, DV: tl.constexpr, WD: tl.constexpr, WDV: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """One image; the sum of each row of the result, not finite if the row is not."""
    rate = scale * LOG2E
    query = load_rows(q[0] + image * q[1] + h.to(tl.int64) * q[2], at[0], D, WD)
    key = load_across(k[0] + image * k[1] + (h // ratio).to(tl.int64) * k[2], at[1], D, WD)
    values = load_rows(v[0] + image * v[1] + (h // ratio).to(tl.int64) * v[2], at[2], DV, WDV)
    s = tl.dot(query, key, acc=start, input_precision=PRECISION)
    if CAREFUL:
        s = tl.where(start == -INF, -INF, s)
    top = tl.max(s, -1)
    shift = tl.where(top == -INF, 0.0, top)
    p = tl.exp2(s * rate - tl.expand_dims(shift * rate, -1))
    total = tl.sum(p, -1)
    if CAREFUL:
        p = tl.where((start > -INF) & tl.expand_dims(ill_rows(values), -2), float("nan"), p)
        values = clean(values)
    found = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    found = found * tl.expand_dims(1.0 / tl.where(total == 0, 1.0, total), -1)
    row = (image * heads + h) * n
    written = tl.expand_dims(q_token >= 0, -1) & (tl.arange(0, WDV) < DV)
    to = out[0] + image * out[1] + h.to(tl.int64) * out[2]
    tl.store(to + at[3], found.to(out[0].dtype.element_ty), mask=written)
    tl.store(lse + row + q_token, shift * scale + tl.log(total), mask=q_token >= 0)
    return tl.sum(found, -1)
