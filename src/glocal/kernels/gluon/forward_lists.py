"""What the forward kernel reads of a plan: the tiles of a program, their key blocks and mask numbers, step by step.

A step takes C.keys keys: a part of a key block, one, or two. Tuples are those of `forward_q`.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def row_of(t, b, h):
    """Start of a plan row."""
    return t[0] + b.to(gl.int64) * t[1] + (h // t[3]).to(gl.int64) * t[2]


@gluon.jit
def head_of(tile, lists, work, C: gl.constexpr):
    """Sample, query head and query block of a tile, and its lengths: its row in the lists, partial key blocks, whether
    the first step lacks its first key block (1 or 0), steps that hide something, which come first, and all steps.
    """
    if work[0] is not None:  # one load after another would take longer than a product
        line = work[0] + tile.to(gl.int64) * 4
        tile, place = gl.load(line), gl.load(line + 1).to(gl.int64)
        part, every = gl.load(line + 2), gl.load(line + 3)
    member, block = tile // work[2], tile % work[2]
    b, h = member // work[1], member % work[1]
    if work[0] is None:
        place = gl.load(row_of(lists[0], b, h)).to(gl.int64) * work[2] + block
        part = gl.load(lists[2][0] + place)
        every = part + gl.load(lists[1][0] + place)
    if C.keys > C.block:
        odd = every % 2
        row = (place, part, odd, (part + odd + 1) // 2, (every + odd) // 2)
    else:
        STEPS: gl.constexpr = C.block // C.keys
        row = (place, part, every * 0, part * STEPS, every * STEPS)
    return (b, h, block), row


@gluon.jit
def entry_of(row, step, J: gl.constexpr, C: gl.constexpr):
    """Number in the list of the key block number J of a step; -1 for the one that is lacking."""
    if C.keys > C.block:
        return step * 2 + J - row[2]
    else:
        return step // (C.block // C.keys)


@gluon.jit
def block_of(lists, row, entry):
    """Key block of an entry; partial blocks come first."""
    full_at = lists[1][1] + row[0] * lists[1][2] + (entry - row[1])
    part_at = lists[2][1] + row[0] * lists[2][2] + entry
    return gl.load(gl.where(entry < row[1], part_at, full_at))


@gluon.jit
def mask_of(lists, row, entry):
    """Mask number of an entry."""
    seen = (entry >= 0) & (entry < row[1])
    return gl.load(lists[2][3] + row[0] * lists[2][2] + entry, mask=seen, other=lists[3])


@gluon.jit
def masks_of(lists, row, step, C: gl.constexpr):
    """Mask numbers of a step, a pair; twice the same where it has one key block."""
    first = mask_of(lists, row, entry_of(row, step, 0, C))
    if C.keys > C.block:
        return first, mask_of(lists, row, entry_of(row, step, 1, C))
    else:
        return first, first
