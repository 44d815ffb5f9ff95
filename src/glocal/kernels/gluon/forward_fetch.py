"""The warp of the forward kernel that fetches by TMA. Tuples are those of `forward_q`."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from glocal.kernels.gluon.boxes import BITS
from glocal.kernels.gluon.forward_lists import block_of, entry_of, head_of

SHIFT = gl.constexpr(BITS)


@gluon.jit
def after(slot, phase, COUNT: gl.constexpr):
    """The slot after `slot` in a ring of COUNT, and its phase."""
    last = slot == COUNT - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def spot_of(boxes, row, ROWS: gl.constexpr):
    """Where the tile of ROWS rows that starts at `row` of the plan order lies: its row there, or its corner."""
    if boxes is None:
        return row
    else:
        return gl.load(boxes[0] + row // ROWS)


@gluon.jit
def coordinates(boxes, b, h, spot, column):
    """Of a tile, for its descriptor."""
    if boxes is None:
        return (b, h, spot, column)
    else:
        lead = boxes[1]
        x, y = spot.to(gl.int32) & ((1 << SHIFT) - 1), (spot >> SHIFT).to(gl.int32) & ((1 << SHIFT) - 1)
        t = (spot >> 2 * SHIFT).to(gl.int32)
        return (b * lead[0] + h * lead[1], b * lead[2] + h * lead[3] + t, y, x, column)


@gluon.jit
def spots_of(boxes, lists, row, step, C: gl.constexpr):
    """Of the keys of a step, a pair; twice the same where one tile is all. A lacking block is read as its neighbour."""
    if C.keys > C.block:
        first = block_of(lists, row, gl.maximum(entry_of(row, step, 0, C), 0))
        second = block_of(lists, row, entry_of(row, step, 1, C))
        return spot_of(boxes, first * C.block, C.block), spot_of(boxes, second * C.block, C.block)
    else:
        at = block_of(lists, row, entry_of(row, step, 0, C)) * C.block + step % (C.block // C.keys) * C.keys
        spot = spot_of(boxes, at, C.keys)
        return spot, spot


@gluon.jit
def fetch(loads, C: gl.constexpr):
    """The warp that fetches: the queries of a tile once, keys and values of its list into rings."""
    _, k, v, boxes, shared, ready, lists, work, group, tiles = loads
    _, ks, vs = shared
    _, _, k_ready, k_free, v_ready, v_free = ready
    k_slot, k_phase = gl.to_tensor(0), gl.to_tensor(1)  # the first round waits for nobody
    v_slot, v_phase = gl.to_tensor(0), gl.to_tensor(1)
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        at, row = head_of(tile, lists, work, C)
        b, h, block = at
        if row[4] > 0:
            kv_head = h // group
            mine = spots_of(boxes[1], lists, row, 0, C)
            k_slot, k_phase = fetch_one(k, ks, (k_ready, k_free), boxes[1], (b, kv_head), mine, (k_slot, k_phase), C)
            q_slot, q_phase = fetch_queries(loads, (b, h, block), q_slot, q_phase, C)
            for i in range(1, row[4]):
                coming = spots_of(boxes[1], lists, row, i, C)
                k_slot, k_phase = fetch_one(
                    k, ks, (k_ready, k_free), boxes[1], (b, kv_head), coming, (k_slot, k_phase), C
                )
                v_slot, v_phase = fetch_one(
                    v, vs, (v_ready, v_free), boxes[2], (b, kv_head), mine, (v_slot, v_phase), C
                )
                mine = coming
            v_slot, v_phase = fetch_one(v, vs, (v_ready, v_free), boxes[2], (b, kv_head), mine, (v_slot, v_phase), C)
    if C.joined:  # what the groups ask for after the last tile, of no use to them
        at, row = head_of(gl.program_id(0), lists, work, C)
        b, h, block = at
        mine = spots_of(boxes[1], lists, row, 0, C)
        fetch_one(k, ks, (k_ready, k_free), boxes[1], (b, h // group), mine, (k_slot, k_phase), C)
        fetch_queries(loads, (b, h, block), q_slot, q_phase, C)


@gluon.jit
def fetch_queries(loads, at, slot, phase, C: gl.constexpr):
    """The queries of a tile as soon as their slot is free."""
    PARTS: gl.constexpr = C.rows // 64
    q, boxes, ready, qs = loads[0], loads[3], loads[5], loads[4][0]
    mbarrier.wait(ready[1].index(slot), phase)
    mbarrier.expect(ready[0].index(slot), q.block_type.nbytes * PARTS)
    for i in gl.static_range(PARTS):
        spot = spot_of(boxes[0], at[2] * C.rows + i * 64, 64)
        tma.async_copy_global_to_shared(
            q, coordinates(boxes[0], at[0], at[1], spot, 0), ready[0].index(slot), qs.index(slot * PARTS + i)
        )
    return after(slot, phase, C.queries)


@gluon.jit
def fetch_one(t, ring, bars, boxes, at, spots, turn, C: gl.constexpr):
    """Keys or values of a step as soon as their slot is free. Tiles of the ring are pieces of a slot: all that have
    the same columns, one after the other, are the rows of a tile of C.keys keys.
    """
    GANG: gl.constexpr = 2 if C.keys > C.block else 1
    COLUMNS: gl.constexpr = t.block_type.shape[len(t.block_type.shape) - 1]
    PIECES: gl.constexpr = ring.shape[0] // C.stages
    slot, phase = turn
    mbarrier.wait(bars[1].index(slot), phase)
    mbarrier.expect(bars[0].index(slot), t.block_type.nbytes * PIECES)
    for i in gl.static_range(PIECES):
        place = coordinates(boxes, at[0], at[1], spots[i % GANG], i // GANG * COLUMNS)
        tma.async_copy_global_to_shared(t, place, bars[0].index(slot), ring.index(slot * PIECES + i))
    return after(slot, phase, C.stages)
