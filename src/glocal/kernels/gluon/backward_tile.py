"""What the backward kernels share: layouts of products, bits of mask words, results to memory.

An accumulator [rows, columns] of Hopper's products lies in fragments: lane 4 l + m of a warp holds rows l and l + 8 and
of every eight columns 2 m and 2 m + 1.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.runtime.jit import constexpr_function


@constexpr_function
def products(down, columns, across=1):
    """Accumulators of `down` times `across` warps, 16 rows and `columns` columns a warp."""
    return gl.NVMMADistributedLayout([3, 0], [down, across], [16, columns, 16])


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


@builtin
def async_add(descriptor, place, tile, _semantic: Any = None):
    """Add a shared tile to memory through TMA; `tma.store_wait` waits for it. Triton 3.6 does not export it."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, place, tile.handle)


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
    p = gl.where((bits & place) != 0, p, 0.0)
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
