"""Register layouts and loads of the window kernels in Gluon: operands go from memory into the registers of products.

Windows of a tile overlap those of its neighbours, so keys come from the first-level cache; what a copy through shared
memory would cost is saved. A lane reads 16 bytes of a row of the left or right operand of a product over the head size.
Where the product runs over tokens (P V, and gradients), `turned` makes its right operand of the same registers.

Tensors have an axis of G in front: tiles, each of one warp, or SPLIT equal parts of the columns of one tile. A warp
takes its columns in PIECES of N; ALL: columns of a part as the tables of tiles hold them.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.runtime.jit import constexpr_function

from glocal.kernels.gluon.masks import SELECT

INF = gl.constexpr(float("inf"))
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
TURN = gl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")


@constexpr_function
def _steps(n):
    """1, 2, 4 ... below n, a power of two."""
    return [1 << i for i in range(n.bit_length() - 1)]


@constexpr_function
def products(G, M):
    """Accumulators [G, M, any]."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[G, M // 16, 1], instr_shape=[1, 16, 8])


@constexpr_function
def operand(side, G, M, width):
    """Left (0) or right (1) operand; width: neighbours along the summed axis that a lane holds."""
    return gl.DotOperandLayout(side, products(G, M), width)


@constexpr_function
def along(wide):
    """Neighbours along the head size, up to 16 bytes of 16-bit numbers."""
    return min(8, wide // 4)


@constexpr_function
def natural_layout(G, M, wide):
    """[G, M, wide] as `natural` returns it, with `along(wide)` columns side by side in a lane."""
    side = along(wide)
    registers = (
        [[0, 0, s] for s in _steps(side)] + [[0, 8, 0]] + [[0, 0, 4 * side * s] for s in _steps(wide // side // 4)]
    )
    lanes = [[0, 0, side], [0, 0, 2 * side], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[0, 16 * s, 0] for s in _steps(M // 16)] + [[s, 0, 0] for s in _steps(G)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [G, M, wide])


@constexpr_function
def twos(G, M, n):
    """[G, n, 2]: two numbers for each column of products."""
    registers = [[0, 0, 1], [0, 1, 0]] + [[0, 8 * s, 0] for s in _steps(n // 8)]
    lanes = [[0, 2, 0], [0, 4, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    warps = [[0, 0, 0] for _ in _steps(M // 16)] + [[s, 0, 0] for s in _steps(G)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [G, n, 2])


@gluon.jit
def listed(
    table, group, count, G: gl.constexpr, SIZE: gl.constexpr, ALL: gl.constexpr, SPLIT: gl.constexpr, L: gl.constexpr
):
    """Tokens [G, SIZE] of a group of tiles, -1 for pads; tiles beyond the last hold its tokens.

    ALL: tokens from one tile to the next. SPLIT: how often each tile stands in a row.
    """
    place = (group * G + gl.arange(0, G, layout=gl.SliceLayout(1, L))) // SPLIT
    slot = gl.arange(0, SIZE, layout=gl.SliceLayout(0, L))
    return gl.load(table + (gl.expand_dims(gl.minimum(place, count - 1) * ALL, 1) + gl.expand_dims(slot, 0)))


@gluon.jit
def tokens(
    table, group, count, G: gl.constexpr, SIZE: gl.constexpr, ALL: gl.constexpr, SPLIT: gl.constexpr, L: gl.constexpr
):
    """As `listed`, -1 in tiles beyond the last too; and the same with some token of the tile where there is none."""
    place = (group * G + gl.arange(0, G, layout=gl.SliceLayout(1, L))) // SPLIT
    found = listed(table, group, count, G, SIZE, ALL, SPLIT, L)
    first = gl.expand_dims(gl.minimum(place, count - 1) * ALL, 1)
    some = gl.where(found < 0, gl.maximum(gl.load(table + first), 0), found)
    return gl.where(gl.expand_dims(place < count, 1), found, -1), some


@gluon.jit
def row_offsets(
    table, group, count, t, G: gl.constexpr, SIZE: gl.constexpr, SPLIT: gl.constexpr, WIDE: gl.constexpr,
    L: gl.constexpr,
):  # fmt: skip
    """Offsets [G, SIZE, WIDE] of rows in the layout L; t: (pointer, strides of image, head, token, column)."""
    some = tokens(table, group, count, G, SIZE, SIZE, SPLIT, gl.SliceLayout(2, L))[1]
    column = gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    return (gl.expand_dims(some, 2) * t[3] + gl.expand_dims(gl.expand_dims(column, 0), 1) * t[4]).to(gl.uint32)


@gluon.jit
def across(some, i, t, WIDE: gl.constexpr, L: gl.constexpr):
    """Offsets [G, WIDE, SIZE] of columns in the layout L for tokens [G, SIZE]; t: (pointer, strides of token, column).

    As if they depended on the loop variable i: made in each round, they take no registers from one to the next.
    """
    some = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [some, i], some.dtype, is_pure=True, pack=1)
    row = gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    return (gl.expand_dims(some, 1) * t[1] + gl.expand_dims(gl.expand_dims(row, 0), 2) * t[2]).to(gl.uint32)


@gluon.jit
def load_rows(t, offset, SIZE: gl.constexpr, WIDE: gl.constexpr, L: gl.constexpr):
    """Rows [G, n, WIDE] at the pointer t, 0 from column SIZE on. Pads hold some token of the tile; nobody sees them."""
    if SIZE < WIDE:
        column = gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
        inside = gl.expand_dims(gl.expand_dims(column, 0), 1) < SIZE
        return gl.load(t + offset, mask=inside & (offset >= 0), other=0.0)
    return gl.load(t + offset)


@gluon.jit
def load_columns(t, offset, SIZE: gl.constexpr, WIDE: gl.constexpr, L: gl.constexpr):
    """The same as columns, [G, WIDE, n]."""
    if SIZE < WIDE:
        row = gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
        inside = gl.expand_dims(gl.expand_dims(row, 0), 2) < SIZE
        return gl.load(t + offset, mask=inside & (offset >= 0), other=0.0)
    return gl.load(t + offset)


@gluon.jit
def piece_of(
    c, rows, columns, masks, group, count, head, table, scale, RIGHT: gl.constexpr, G: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, ALL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Of piece c of the columns: who sees it, as in `table_of`, and some tokens as `across` takes them.

    rows [count, M], columns [count, SPLIT * ALL], masks: the tables of tiles. table, scale: as in `table_of`.
    """
    C: gl.constexpr = products(G, M)
    mine = tokens(rows, group, count, G, M, M, SPLIT, gl.SliceLayout(2, C))[0]
    theirs = tokens(columns + c * N, group, count * SPLIT, G, N, ALL, 1, gl.SliceLayout(1, C))[0]
    start = table_of(masks + c * (N // 32), group, count, mine, theirs, head, table, scale, G, M, N, ALL, SPLIT)
    return start, tokens(columns + c * N, group, count * SPLIT, G, N, ALL, 1, gl.SliceLayout(1, RIGHT))[1]


@gluon.jit
def pieces_of(
    rows, columns, masks, group, count, head, table, scale, RIGHT: gl.constexpr, G: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, ALL: gl.constexpr, PIECES: gl.constexpr, SPLIT: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Of all pieces, to be held in registers: who sees them, as `logits` takes it, and tokens."""
    seen, places = (), ()
    for c in gl.static_range(PIECES):
        start, place = piece_of(
            c, rows, columns, masks, group, count, head, table, scale, RIGHT, G, M, N, ALL, SPLIT
        )  # fmt: skip
        seen = seen + (bits_of(start, G, M, N) if WORDS else start,)
        places = places + (place,)
    return seen, places


@gluon.jit
def logits(left, right, seen, G: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    """Products [G, M, N] of left [G, M, any] and right [G, any, N], -inf where a pair is hidden.

    seen: words as of `bits_of`, or a table as of `table_of`.
    """
    if seen.dtype == gl.int32:
        s = mma_v2(left, right, gl.zeros([G, M, N], gl.float32, layout=products(G, M)))
        s = hidden(s, seen, G, M, N)
    else:
        s = mma_v2(left, right, seen)
    return s


@gluon.jit
def settled(x, zero):
    """x, of 16-bit numbers. Left operands lie in four registers in a row, which else are filled before each product."""
    nothing = gl.full(x.shape, 0, gl.int16, layout=x.type.layout) + zero.to(gl.int16)
    return gl.inline_asm_elementwise("xor.b32 $0, $1, $2;", "=r,r,r", [x, nothing], x.dtype, is_pure=True, pack=2)


@gluon.jit
def turned(x, G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, WIDE: gl.constexpr):
    """Columns [G, WIDE, N], the right operand of a product over the head size -> rows [G, N, WIDE], that of a product
    over tokens, with columns in an order that `natural` undoes. An instruction turns 8 x 8 numbers of a warp.
    """
    SIDE: gl.constexpr = along(WIDE)
    BLOCKS: gl.constexpr = WIDE // SIDE // 4
    x = gl.inline_asm_elementwise(TURN, "=r,r", [x], x.dtype, is_pure=True, pack=2)
    seven = gl.reshape(x, [G, BLOCKS, 4, SIDE // 2, 2, N // 8, 8])
    x = gl.reshape(gl.permute(seven, [0, 5, 2, 4, 1, 3, 6]), [G, N, WIDE])
    return gl.convert_layout(x, operand(1, G, M, 2), assert_trivial=True)


@gluon.jit
def natural(x, G: gl.constexpr, M: gl.constexpr, WIDE: gl.constexpr):
    """Products [G, M, WIDE] with the columns of `turned` -> the same in their own order."""
    SIDE: gl.constexpr = along(WIDE)
    six = gl.permute(gl.reshape(x, [G, M, WIDE // SIDE // 4, SIDE // 2, 4, 2]), [0, 1, 2, 4, 3, 5])
    return gl.convert_layout(gl.reshape(six, [G, M, WIDE]), natural_layout(G, M, WIDE), assert_trivial=True)


@gluon.jit
def store_rows(
    t, x, table, group, count, image, head,
    SIZE: gl.constexpr, WIDE: gl.constexpr, G: gl.constexpr, M: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Write x [G, M, WIDE], columns as `turned` has them, as rows of SIZE of an image and a head of t.

    t: (pointer, strides of image, head, token, column). table: the tokens of tiles. SPLIT: x of so many neighbours on
    the first axis is added up.
    """
    L: gl.constexpr = natural_layout(G, M, WIDE)
    if SPLIT > 1:
        parts = gl.reshape(x, [G // SPLIT, SPLIT, M, WIDE])
        FOUR: gl.constexpr = parts.type.layout
        total = gl.expand_dims(gl.sum(parts, 1), 1) + gl.zeros([G // SPLIT, SPLIT, M, WIDE], gl.float32, layout=FOUR)
        x = gl.convert_layout(gl.reshape(total, [G, M, WIDE]), products(G, M), assert_trivial=True)
    x = natural(x.to(t[0].dtype.element_ty), G, M, WIDE)
    token = gl.expand_dims(tokens(table, group, count, G, M, M, SPLIT, gl.SliceLayout(2, L))[0], 2)
    column = gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    column = gl.expand_dims(gl.expand_dims(column, 0), 1)
    own = token >= 0
    if SIZE < WIDE:
        own = own & (column < SIZE)
    if SPLIT > 1:
        turn = gl.arange(0, G, layout=gl.SliceLayout(1, gl.SliceLayout(2, L))) % SPLIT
        own = own & (gl.expand_dims(gl.expand_dims(turn, 1), 2) == 0)
    to = t[0] + image * t[1] + head.to(gl.int64) * t[2]
    gl.store(to + (token * t[3] + column * t[4]), x, mask=own)


@gluon.jit
def load_both(
    first, second, place, i,
    D: gl.constexpr, DV: gl.constexpr, WD: gl.constexpr, WDV: gl.constexpr, G: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """Columns [G, WD, N] and [G, WDV, N] of two tensors, (pointer, steps) as in `across`, at the same tokens."""
    RIGHT: gl.constexpr = operand(1, G, M, along(WD))
    RIGHT_V: gl.constexpr = operand(1, G, M, along(WDV))
    one = load_columns(first[0], across(place, i, first, WD, RIGHT), D, WD, RIGHT)
    place = gl.convert_layout(place, gl.SliceLayout(1, RIGHT_V), assert_trivial=True)
    return one, load_columns(second[0], across(place, i, second, WDV, RIGHT_V), DV, WDV, RIGHT_V)


@gluon.jit
def quick(x, WHAT: gl.constexpr):
    """WHAT of float32 x, "rcp" or "lg2", as one instruction: right to 2^-22."""
    NAME: gl.constexpr = WHAT + ".approx.ftz.f32 $0, $1;"
    return gl.inline_asm_elementwise(NAME, "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def clean(x):
    """Entries that are not finite become 0: they belong to pairs that are hidden or are charged elsewhere."""
    return gl.where(gl.abs(x.to(gl.float32)) < INF, x, 0.0).to(x.dtype)


@gluon.jit
def ill_columns(x):
    """Whether a column of [G, WIDE, n] holds an entry that is not finite, int32 [G, n]."""
    return gl.max(gl.where(gl.abs(x.to(gl.float32)) < INF, 0, 1), 1)


@gluon.jit
def table_of(
    masks, group, count, mine, theirs, head, table, scale,
    G: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ALL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """float32 [G, M, N]: table entry / scale of the seen pairs, -inf elsewhere.

    masks: int32 [tiles, M, SPLIT * ALL / 32], N columns of each ALL. mine [G, M], theirs [G, N]: tokens. table:
    (values, head stride, width, codes of rows, codes of columns) or None.
    """
    L: gl.constexpr = products(G, M)
    WORDS: gl.constexpr = SPLIT * ALL // 32
    place = group * G + gl.arange(0, G, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    row = gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    column = gl.expand_dims(gl.expand_dims(gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, L))), 0), 1)
    start = gl.minimum(place // SPLIT, count - 1).to(gl.int64) * (M * WORDS) + place % SPLIT * (ALL // 32)
    at = gl.expand_dims(gl.expand_dims(start, 1), 2) + gl.expand_dims(gl.expand_dims(row, 0), 2) * WORDS + column // 32
    seen = (gl.load(masks + at) >> (column % 32)) & 1
    ours, others = gl.expand_dims(mine, 2), gl.expand_dims(theirs, 1)
    seen = (seen == 1) & (ours >= 0) & (others >= 0)
    found = gl.zeros([G, M, N], gl.float32, layout=L)
    if table is not None:
        code = gl.expand_dims(gl.load(table[4] + theirs, mask=theirs >= 0, other=0), 1)
        code = code - gl.expand_dims(gl.load(table[3] + mine, mask=mine >= 0, other=0), 2)
        inside = seen & (code >= 0) & (code < table[2])
        found += gl.load(table[0] + head.to(gl.int64) * table[1] + code, mask=inside, other=0.0).to(gl.float32)
    return gl.where(seen, found / scale, -INF)


@gluon.jit
def bits_of(start, G: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    """Which entries of a table [G, M, N] are not -inf: a word for the columns, up to 128, that a lane owns of a row."""
    seen = gl.reshape(gl.where(start == -INF, 0, 1), [G, M, N // 8, 4, 2])
    L: gl.constexpr = seen.type.layout
    return gl.sum(gl.sum(seen * _places(L, N), 4), 2)


@gluon.jit
def hidden(s, bits, G: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    """s [G, M, N] with -inf where the words of `bits_of` have no bit."""
    C: gl.constexpr = s.type.layout
    five = gl.reshape(s, [G, M, N // 8, 4, 2])
    L: gl.constexpr = five.type.layout
    bits = gl.expand_dims(gl.expand_dims(bits, 2), 4)
    five = gl.inline_asm_elementwise(SELECT, "=f,f,r,r", [five, bits, _places(L, N)], gl.float32, is_pure=True, pack=1)
    return gl.convert_layout(gl.reshape(five, [G, M, N]), C, assert_trivial=True)


@gluon.jit
def _places(L: gl.constexpr, N: gl.constexpr):
    """The bit of each column, int32 [1, 1, N / 8, 1, 2]."""
    pair = gl.arange(0, N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
    side = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))))
    pair = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(pair, 0), 1), 3), 4)
    side = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(side, 0), 1), 2), 3)
    return gl.full([1, 1, 1, 1, 1], 1, gl.int32, layout=L) << (pair * 2 + side)
