"""What the window kernels share: offsets of a group of tiles, and its mask and bias as one table that stays put.

A program holds G tiles of M queries (or keys) and the N tokens on the other side that any of them touches, for one
head, and walks over images. All that depends on positions alone is made once: offsets in 32 bits, and the table
[G, M, N] that starts the accumulator of the first product: bias / scale where a pair is seen, -inf where it is not.
Tensors of a single tile have no axis G, so that several warps can share it.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_rows(table, group, count, G: tl.constexpr, SIZE: tl.constexpr, ALL: tl.constexpr):
    """Tokens [G, SIZE] of a group of tiles, -1 where there is none; and the same with some token of the tile there.

    ALL: tokens from one tile to the next.
    """
    slot = tl.arange(0, SIZE)
    if G == 1:
        found = tl.load(table + group * ALL + slot)
        some = tl.where(found < 0, tl.maximum(tl.load(table + group * ALL), 0), found)
    else:
        place = group * G + tl.arange(0, G)
        start = table + tl.minimum(place, count - 1) * ALL
        found = tl.load(start[:, None] + slot[None, :])
        some = tl.where(found < 0, tl.maximum(tl.load(start), 0)[:, None], found)
        found = tl.where((place < count)[:, None], found, -1)
    return found, some


@triton.jit
def offsets(token, stride, step, WIDE: tl.constexpr):
    """Element offsets [G, n, WIDE] of rows of tokens [G, n]; int32."""
    return (tl.expand_dims(token, -1) * stride + tl.arange(0, WIDE) * step).to(tl.uint32)


@triton.jit
def offsets_across(token, stride, step, WIDE: tl.constexpr):
    """The same as columns, [G, WIDE, n]."""
    return (tl.expand_dims(token, -2) * stride + tl.arange(0, WIDE)[:, None] * step).to(tl.uint32)


@triton.jit
def load_rows(t, offset, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Rows [G, n, WIDE] at the pointer t, 0 from column SIZE on. Pads hold some token of the tile; nobody sees them."""
    if SIZE < WIDE:
        return tl.load(t + offset, mask=(tl.arange(0, WIDE) < SIZE) & (offset >= 0), other=0.0)
    return tl.load(t + offset)


@triton.jit
def load_across(t, offset, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """The same as columns, [G, WIDE, n]."""
    if SIZE < WIDE:
        return tl.load(t + offset, mask=(tl.arange(0, WIDE) < SIZE)[:, None] & (offset >= 0), other=0.0)
    return tl.load(t + offset)


@triton.jit
def ends(lse, grad_lse, grad, out, token):
    """Of rows [G, n] at lse + token: the LSE in base 2, inf where nothing is seen, and minus the sum of grad * out
    (rows [G, n, WIDE]) and the gradient of the LSE, with which gradients of logits begin.
    """
    end = tl.load(lse + token)
    empty = end == -INF
    share = tl.where(empty, 0.0, tl.load(grad_lse + token))
    share -= tl.sum(grad.to(tl.float32) * out.to(tl.float32), -1)
    return tl.where(empty, INF, end * LOG2E), share


@triton.jit
def store_sums(
    grad_table, sums, chunk, h, heads, group, count,
    FROM: tl.constexpr, G: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """sums [G, M, WIDTH] of a program to grad_table [programs over images, H, tiles, M, N], from column FROM on."""
    place = grad_table + ((chunk * heads + h).to(tl.int64) * count + group * G) * (M * N) + FROM
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, WIDTH)
    if G == 1:
        tl.store(place + at, sums)
    else:
        tile = tl.arange(0, G)[:, None, None]
        tl.store(place + tile * (M * N) + at, sums, mask=group * G + tile < count)


@triton.jit
def clean(x):
    """Entries that are not finite become 0: they belong to pairs that are hidden or are charged elsewhere."""
    return tl.where(tl.abs(x.to(tl.float32)) < INF, x, 0.0).to(x.dtype)


@triton.jit
def ill_rows(x):
    """Whether a row of [G, n, WIDE] holds an entry that is not finite, bool [G, n]."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < INF, 0, 1), -1) > 0


@triton.jit
def table_of(
    masks, group, count, mine, theirs, head, table, scale,
    G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """float32 [G, M, N]: table entry / scale of the seen pairs, -inf elsewhere.

    masks: int32 [tiles, M, ALL / 32], N columns of them. mine [G, M], theirs [G, N]: tokens. table: (values, head
    stride, width, codes of rows, codes of columns) or None.
    """
    WORDS: tl.constexpr = ALL // 32
    column = tl.arange(0, N)
    place = tl.arange(0, M)[:, None] * WORDS + column // 32
    if G == 1:
        word = tl.load(masks + group.to(tl.int64) * (M * WORDS) + place)
    else:
        tile = tl.minimum(group * G + tl.arange(0, G), count - 1).to(tl.int64)
        word = tl.load(masks + tile[:, None, None] * (M * WORDS) + place[None, :, :])
    seen = (word >> (column % 32)) & 1
    seen = (seen == 1) & (tl.expand_dims(mine, -1) >= 0) & (tl.expand_dims(theirs, -2) >= 0)
    found = tl.zeros(seen.shape, tl.float32)
    if table is not None:
        ours = tl.load(table[3] + mine, mask=mine >= 0, other=0)
        others = tl.load(table[4] + theirs, mask=theirs >= 0, other=0)
        code = tl.expand_dims(others, -2) - tl.expand_dims(ours, -1)
        inside = seen & (code >= 0) & (code < table[2])
        found += tl.load(table[0] + head.to(tl.int64) * table[1] + code, mask=inside, other=0.0).to(tl.float32)
    return tl.where(seen, found / scale, -INF)
