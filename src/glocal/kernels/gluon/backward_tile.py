"""What the backward kernels share: layouts of products, bits of mask words, results to memory.

An accumulator [rows, columns] of Hopper's products lies in fragments: lane 4 l + m of a warp holds rows l and l + 8 and
of every eight columns 2 m and 2 m + 1.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

# Neighbours lie in one register where they have 16 bits, and an instruction takes both: one by one they would take the
# unit of the powers.
ROUND = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
ROUND_HALF = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
WIDEN = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;")
WIDEN_HALF = gl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")
# Left to themselves, compilers make bits of many comparisons and take them apart again.
SELECT = gl.constexpr(
    "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, 0f00000000, p; }"
)
# The results are of no use, but an operation of elements must have some. Minus zero changes nothing: without it ptxas
# 12.8 ends with a fault where sums come straight from a product.
ADD = gl.constexpr(
    "{ .reg .f32 a, b, c, d; "
    "add.f32 a, $8, 0f80000000; add.f32 b, $9, 0f80000000; add.f32 c, $10, 0f80000000; add.f32 d, $11, 0f80000000; "
    "red.relaxed.gpu.global.add.v4.f32 [$4], {a, b, c, d}; "
    "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)
ADD_REGISTERS = gl.constexpr("=r,=r,=r,=r,l,l,l,l,f,f,f,f")


@constexpr_function
def products(down, columns, across=1):
    """Accumulators of `down` times `across` warps, 16 rows and `columns` columns a warp."""
    return gl.NVMMADistributedLayout([3, 0], [down, across], [16, columns, 16])


@constexpr_function
def share(queries, keys, width):
    """Rows and columns of the query gradients of a step that one of two groups makes."""
    return (keys, width) if queries > keys else (queries, width // 2)


@constexpr_function
def fragments(rows, columns):
    """Accumulators [rows, columns] of rows / 16 warps, seen as [rows, columns / 8, 4, 2]."""
    registers = [[0, 0, 0, 1], [8, 0, 0, 0]]
    step = 1
    while step * 8 < columns:
        registers.append([0, step, 0, 0])
        step *= 2
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = []
    step = 16
    while step < rows:
        warps.append([step, 0, 0, 0])
        step *= 2
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, columns // 8, 4, 2])


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x, float32, in 16 bits."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(ROUND, "=r,f,f", [x], gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(ROUND_HALF, "=r,f,f", [x], gl.float16, is_pure=True, pack=2)


@gluon.jit
def widened(x):
    """x, 16 bits, in float32."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(WIDEN, "=f,=f,r", [x], gl.float32, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(WIDEN_HALF, "=f,=f,r", [x], gl.float32, is_pure=True, pack=2)


@gluon.jit
def add(sums, row, column, values, WIDTH: gl.constexpr):
    """Add accumulators [rows, columns] to float32 sums of rows of WIDTH, from (row, column) on.

    The sums lie as the accumulators do, in blocks of 16 rows and 8 columns one after the other: of each lane of a warp
    two neighbours of one row and the two that are eight rows below.
    """
    layout: gl.constexpr = values.type.layout
    r = gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    r = r // 16 * (16 * WIDTH) + r % 8 * 16 + r // 8 % 2 * 2
    c = c // 8 * 128 + c % 8 // 2 * 4 + c % 2
    to = sums + (row.to(gl.int64) * WIDTH + column * 16)
    to = to + (gl.expand_dims(r, 1) + gl.expand_dims(c, 0))
    gl.inline_asm_elementwise(ADD, ADD_REGISTERS, [to.to(gl.int64), values], gl.int32, is_pure=False, pack=4)


@gluon.jit
def load_words(table, mask, first, block, rows: gl.constexpr, columns: gl.constexpr):
    """Words [rows, 4] of rows first .. first + rows of a mask, one a row and lane of four; int32 [masks, block, 4]."""
    kind: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, fragments(rows, columns)))
    row = first + gl.arange(0, rows, layout=gl.SliceLayout(1, kind))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, kind))
    start = table + mask.to(gl.int64) * (block * 4)
    return gl.load(start + gl.expand_dims(row, 1) * 4 + gl.expand_dims(lane, 0))


@gluon.jit
def hide(p, word, rows: gl.constexpr, columns: gl.constexpr):
    """p [rows, columns], 0 where bit 2 i + j of the word of lane m is not set for column 8 i + 2 m + j."""
    layout: gl.constexpr = p.type.layout
    kind: gl.constexpr = fragments(rows, columns)
    bits = gl.expand_dims(gl.expand_dims(word, 1), 3)
    pair = gl.arange(0, columns // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, kind))))
    side = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, kind))))
    pair = gl.expand_dims(gl.expand_dims(gl.expand_dims(pair, 0), 2), 3)
    side = gl.expand_dims(gl.expand_dims(gl.expand_dims(side, 0), 1), 2)
    place = gl.full([1, 1, 1, 1], 1, gl.int32, layout=kind) << (pair * 2 + side)
    p = gl.convert_layout(gl.reshape(p, [rows, columns // 8, 4, 2]), kind, assert_trivial=True)
    p = gl.inline_asm_elementwise(SELECT, "=f,f,r,r", [p, bits, place], gl.float32, is_pure=True, pack=1)
    return gl.convert_layout(gl.reshape(p, [rows, columns]), layout, assert_trivial=True)


@gluon.jit
def store(to, order, values, first, b, h, ROWS: gl.constexpr, D: gl.constexpr, DIRECT: gl.constexpr):
    """Accumulators [ROWS, D] of the slots from `first` on, to the rows of their tokens if DIRECT, else of the slots.

    to: (start of the head, rows, columns). order: (pointer, strides of samples and heads, query heads a plan head).
    """
    layout: gl.constexpr = values.type.layout
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    if DIRECT:
        row = gl.load(order[0] + b * order[1] + (h // order[3]) * order[2] + row)
    row = gl.expand_dims(row, 1)
    column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, layout)), 0)
    place = to[0] + row.to(gl.int64) * to[2] + column
    gl.store(place, values.to(to[0].dtype.element_ty), mask=(row >= 0) & (column < to[2]))
