"""Register and shared-memory layouts of Hopper's products (wgmma, TMA), one warp group of 64 rows at a time."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

ROWS = 64  # of the product that one warp group of four warps computes


@constexpr_function
def products(columns):
    """Accumulators [64, columns] of one warp group."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@constexpr_function
def operand(columns):
    """Left operands [64, any] in registers, for accumulators [64, columns]."""
    return gl.DotOperandLayout(0, products(columns), 2)


@constexpr_function
def quads(columns):
    """Accumulators [64, columns] seen as [64, columns / 8, 4, 2]: a lane holds both columns of its place of four.

    Reshaped to [64, columns], it is `products(columns)` register by register.
    """
    registers = [[0, 0, 0, 1], [8, 0, 0, 0]]
    step = 1
    while step * 8 < columns:
        registers.append([0, step, 0, 0])
        step *= 2
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, columns // 8, 4, 2])


@constexpr_function
def lines(columns):
    """Accumulators [64, columns] in which a lane holds eight columns in a row: 16 bytes of a result of 16 bits.

    Rows stay with their warp, so that lanes need only exchange registers.
    """
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]]
    step = 32
    while step < columns:
        registers.append([0, step])
        step *= 2
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@constexpr_function
def words(columns):
    """One word a row and lane of four, [64, 4], that broadcasts to `quads(columns)`."""
    return gl.SliceLayout(1, gl.SliceLayout(3, quads(columns)))


@constexpr_function
def tile(rows, columns, dtype):
    """A shared tile [rows, columns] as TMA writes it and wgmma reads it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
