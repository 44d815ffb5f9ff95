"""Block-sparse attention forward on Hopper: online softmax (arXiv 2205.14135) in the manner of FlashAttention-3
(arXiv 2407.08608). One warp fetches keys and values by TMA; each group of four warps holds 64 query rows and runs the
softmax of one key block while the tensor cores work on the products of the next.

Tuples that travel together: `lists` is (row of `owner`, full, partial, number of the mask that hides nothing), where
full is (counts, key blocks, width) and partial has mask numbers besides; `work` is (order of the query blocks or None,
query heads, query blocks); `score` is (scale, soft-cap or None); a plan row is (pointer, stride of samples, stride of
heads, query heads a plan head); the `boxes` of a tensor are None where its rows lie in plan order, else
(corners, lead) of `boxes.Boxes` and `boxes.Seen`. C is a `tuning.Shape`, known when the kernel is compiled.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from glocal.kernels.gluon import layouts
from glocal.kernels.gluon.boxes import BITS
from glocal.kernels.gluon.masks import hidden, load_words, pad_words

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
SHIFT = gl.constexpr(BITS)


@gluon.jit
def place_of(tile, work):
    """Sample, query head and query block of a tile."""
    if work[0] is not None:
        tile = gl.load(work[0] + tile)
    member = tile // work[2]
    return member // work[1], member % work[1], tile % work[2]


@gluon.jit
def row_of(t, b, h):
    """Start of a plan row."""
    return t[0] + b.to(gl.int64) * t[1] + (h // t[3]).to(gl.int64) * t[2]


@gluon.jit
def lengths(lists, b, h, block, blocks, C: gl.constexpr):
    """Of a query block: its row in the lists, partial key blocks, whether the first step lacks its first key block (1
    or 0), steps that hide something, which come first, and all steps.
    """
    place = gl.load(row_of(lists[0], b, h)).to(gl.int64) * blocks + block
    part = gl.load(lists[2][0] + place)
    every = part + gl.load(lists[1][0] + place)
    if C.keys > C.block:
        odd = every % 2
        return place, part, odd, (part + odd + 1) // 2, (every + odd) // 2
    else:
        STEPS: gl.constexpr = C.block // C.keys
        return place, part, every * 0, part * STEPS, every * STEPS


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
    ROWS: gl.constexpr = C.rows
    QUERIES: gl.constexpr = C.queries
    q, k, v, boxes, shared, ready, lists, work, group, tiles = loads
    PARTS: gl.constexpr = ROWS // 64
    BYTES: gl.constexpr = q.block_type.nbytes * PARTS
    qs, ks, vs = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free = ready
    k_slot, k_phase = gl.to_tensor(0), gl.to_tensor(1)  # the first round waits for nobody
    v_slot, v_phase = gl.to_tensor(0), gl.to_tensor(1)
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, block = place_of(tile, work)
        row = lengths(lists, b, h, block, work[2], C)
        if row[4] > 0:
            kv_head = h // group
            mine = spots_of(boxes[1], lists, row, 0, C)
            k_slot, k_phase = fetch_one(k, ks, (k_ready, k_free), boxes[1], (b, kv_head), mine, (k_slot, k_phase), C)
            mbarrier.wait(q_free.index(q_slot), q_phase)
            mbarrier.expect(q_ready.index(q_slot), BYTES)
            for i in gl.static_range(PARTS):
                to = qs.index(q_slot * PARTS + i)
                at = coordinates(boxes[0], b, h, spot_of(boxes[0], block * ROWS + i * 64, 64), 0)
                tma.async_copy_global_to_shared(q, at, q_ready.index(q_slot), to)
            q_slot, q_phase = after(q_slot, q_phase, QUERIES)
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


@gluon.jit
def capped(s, score):
    """Logits with soft-cap, in powers of two; without one they keep their scale for `weigh`."""
    if score[1] is not None:
        e = gl.exp2(s * (2.0 * LOG2E * score[0] / score[1])) + 1.0
        inverse = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], gl.float32, True, 1)
        s = (1.0 - 2.0 * inverse) * (score[1] * LOG2E)  # soft-cap * tanh
    return s


@gluon.jit
def factor(score):
    """What is left for `weigh` to multiply by."""
    if score[1] is None:
        return score[0] * LOG2E
    else:
        return 1.0


@gluon.jit
def weigh(s, top, total, scale, KEYS: gl.constexpr):
    """Fold logits s [64, KEYS] into the largest logit of each row and the sums of weights, in powers of two.

    Sums [64, 4] are those of each lane of four; they are added up when all is done. Returns weights, largest logit,
    sums, and the factor for what was summed before.
    """
    lanes: gl.constexpr = gl.SliceLayout(1, layouts.words(KEYS))
    new = gl.maximum(top, gl.max(s, 1) * scale)
    shift = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
    old = gl.exp2(top - shift)
    mine = gl.sum(gl.sum(gl.reshape(p, [64, KEYS // 8, 4, 2]), 3), 1)  # [64, 4]
    mine = gl.convert_layout(mine, layouts.words(KEYS), assert_trivial=True)
    total = total * gl.expand_dims(gl.convert_layout(old, lanes, assert_trivial=True), 1) + mine
    return p, new, total, old


@gluon.jit
def packed(p, dtype: gl.constexpr, KEYS: gl.constexpr):
    """Weights [64, KEYS] as the left operand keeps them, two to a word: int32 [64, KEYS / 8, 4].

    Carried through a loop as single numbers of 16 bits they would be taken apart and put together in every round.
    """
    low, high = gl.split(gl.reshape(p, [64, KEYS // 8, 4, 2]))
    kind: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + kind + ".f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def opened(word, dtype: gl.constexpr, KEYS: gl.constexpr, DV: gl.constexpr):
    """The left operand that `packed` packed."""
    low, high = word.to(gl.int16), (word >> 16).to(gl.int16)
    p = gl.reshape(gl.join(low, high), [64, KEYS]).to(dtype, bitcast=True)
    return gl.convert_layout(p, layouts.operand(DV), assert_trivial=True)


@gluon.jit
def scores(q, ks, slot, BK: gl.constexpr):
    """Start q k^T, [64, BK]."""
    blank = gl.zeros([64, BK], gl.float32, layout=layouts.products(BK))
    return warpgroup_mma(q, ks.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)


@gluon.jit
def advance(
    acc, p, top, total, slots, q, shared, ready, word, score,
    C: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """One step: the values of the step before are summed while the logits of this one are weighed."""
    KEYS: gl.constexpr = C.keys
    DV: gl.constexpr = C.dv
    STAGES: gl.constexpr = C.stages
    k_slot, k_phase, v_slot, v_phase = slots
    k_ready, k_free, v_ready, v_free = ready[2], ready[3], ready[4], ready[5]
    wide: gl.constexpr = layouts.products(DV)
    mbarrier.wait(k_ready.index(k_slot), k_phase)
    s = scores(q, shared[1], k_slot, KEYS)
    mbarrier.wait(v_ready.index(v_slot), v_phase)
    left = opened(p, shared[2].dtype, KEYS, DV)
    acc = warpgroup_mma(left, shared[2].index(v_slot), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(k_slot))
    s = capped(s, score)
    if HIDES:
        s = hidden(s, word, KEYS)
    weights, top, total, old = weigh(s, top, total, factor(score), KEYS)
    if C.pinned:  # the barrier is known to be passed, but no instruction is moved across its loop
        mbarrier.wait(v_ready.index(v_slot), v_phase)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(v_free.index(v_slot))
    k_slot, k_phase = after(k_slot, k_phase, STAGES)
    v_slot, v_phase = after(v_slot, v_phase, STAGES)
    acc = acc * gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, wide)), 1)
    return acc, packed(weights, shared[2].dtype, KEYS), top, total, (k_slot, k_phase, v_slot, v_phase)


@gluon.jit
def words_of(lists, masks, row, step, numbers, at, first, C: gl.constexpr):
    """Words of a step: its part of masks number `numbers`, without the pads of its key blocks where there may be any.

    masks: (words of `masks.by_query`, plan row of words of `masks.kept` or None).
    """
    if C.keys > C.block:  # words of both blocks side by side
        low = words_of_one(lists, masks, row, entry_of(row, step, 0, C), numbers[0], at, first, C)
        high = words_of_one(lists, masks, row, entry_of(row, step, 1, C), numbers[1], at, first, C)
        low = gl.where(entry_of(row, step, 0, C) < 0, 0, low)
        return (low & ((1 << C.block // 4) - 1)) | (high << C.block // 4)
    else:
        word = words_of_one(lists, masks, row, entry_of(row, step, 0, C), numbers[0], at, first, C)
        return word >> (step % (C.block // C.keys) * (C.keys // 4))


@gluon.jit
def words_of_one(lists, masks, row, entry, number, at, first, C: gl.constexpr):
    """Words of an entry of the list, for the columns of its key block."""
    word = load_words(masks[0], number, first, C.rows, C.keys)
    if masks[1] is not None:
        block = block_of(lists, row, gl.maximum(entry, 0))
        word = word & pad_words(row_of(masks[1], at[0], at[1]) + block * 4, C.keys)
    return word


@gluon.jit
def attend(mine, PART: gl.constexpr, C: gl.constexpr):
    """One group of four warps: rows 64 * PART .. 64 * PART + 63 of every query block."""
    ROWS: gl.constexpr = C.rows
    KEYS: gl.constexpr = C.keys
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    STAGES: gl.constexpr = C.stages
    QUERIES: gl.constexpr = C.queries
    shared, ready, lists, masks, out, work, score, tiles, ill = mine
    PARTS: gl.constexpr = ROWS // 64
    HIDES: gl.constexpr = C.masked or C.keys > C.block or masks[1] is not None
    q_ready, q_free, k_ready, k_free, v_ready, v_free = ready
    row: gl.constexpr = gl.SliceLayout(1, layouts.products(KEYS))
    zero = gl.to_tensor(0)
    slots = (zero, zero, zero, zero)  # slot and phase of keys, of values
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, block = place_of(tile, work)
        line = lengths(lists, b, h, block, work[2], C)
        count = line[4]
        hiding = count if masks[1] is not None else line[3]
        top = gl.full([64], float("-inf"), gl.float32, layout=row)
        total = gl.zeros([64, 4], gl.float32, layout=layouts.words(KEYS))
        acc = gl.zeros([64, DV], gl.float32, layout=layouts.products(DV))
        if count > 0:
            k_slot, k_phase, v_slot, v_phase = slots
            mbarrier.wait(q_ready.index(q_slot), q_phase)
            q = shared[0].index(q_slot * PARTS + PART).reshape([64, D])
            if C.held:
                q = q.load(layouts.operand(KEYS))
                mbarrier.arrive(q_free.index(q_slot))
            mbarrier.wait(k_ready.index(k_slot), k_phase)
            s = warpgroup_mma_wait(0, deps=[scores(q, shared[1], k_slot, KEYS)])
            mbarrier.arrive(k_free.index(k_slot))
            k_slot, k_phase = after(k_slot, k_phase, STAGES)
            s = capped(s, score)
            if HIDES:
                numbers = masks_of(lists, line, 0, C)
                s = hidden(s, words_of(lists, masks, line, 0, numbers, (b, h), PART * 64, C), KEYS)
            p, top, total, _ = weigh(s, top, total, factor(score), KEYS)
            p = packed(p, shared[2].dtype, KEYS)
            slots = (k_slot, k_phase, v_slot, v_phase)
            if HIDES:
                numbers = masks_of(lists, line, 1, C)
                for i in range(1, hiding):
                    word = words_of(lists, masks, line, i, numbers, (b, h), PART * 64, C)
                    numbers = masks_of(lists, line, i + 1, C)
                    acc, p, top, total, slots = advance(
                        acc, p, top, total, slots, q, shared, ready, word, score, C, True
                    )
            for _ in range(gl.maximum(hiding, 1), count):
                acc, p, top, total, slots = advance(acc, p, top, total, slots, q, shared, ready, None, score, C, False)
            k_slot, k_phase, v_slot, v_phase = slots
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            left = opened(p, shared[2].dtype, KEYS, DV)
            acc = warpgroup_mma(left, shared[2].index(v_slot), acc, is_async=True)
            if not C.held:
                mbarrier.arrive(q_free.index(q_slot))
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_free.index(v_slot))
            v_slot, v_phase = after(v_slot, v_phase, STAGES)
            slots = (k_slot, k_phase, v_slot, v_phase)
            q_slot, q_phase = after(q_slot, q_phase, QUERIES)
        put(acc, top, total, out, (b, h, block), block * ROWS + PART * 64, work[1], ill, C)


@gluon.jit
def put(acc, top, total, out, at, first, heads, ill, C: gl.constexpr):
    """Write the rows of one group to their tokens; `ill`, if not None, becomes 1 where one holds what is not finite."""
    DV: gl.constexpr = C.dv
    REAL: gl.constexpr = C.real
    values, lse, order, n = out
    wide: gl.constexpr = layouts.products(DV)
    side: gl.constexpr = gl.SliceLayout(1, wide)
    top, total = gl.convert_layout(top, side), gl.convert_layout(gl.sum(total, 1), side)
    slot = first + gl.arange(0, 64, layout=side)
    if order is None:
        token = gl.where(slot < n, slot, -1)
    else:
        token = gl.load(row_of(order, at[0], at[1]) + slot)
    acc = acc * gl.expand_dims(1.0 / gl.where(total == 0, 1.0, total), 1)
    if ill is not None:
        gl.store(ill + token * 0, token * 0 + 1, mask=(token >= 0) & (gl.sum(acc, 1) * 0.0 != 0))
    column = gl.arange(0, DV, layout=gl.SliceLayout(0, wide))
    to = (at[0].to(gl.int64) * heads + at[1]) * n + token
    there = gl.expand_dims(token >= 0, 1) & gl.expand_dims(column < REAL, 0)
    gl.store(values + gl.expand_dims(to * REAL, 1) + gl.expand_dims(column, 0), acc.to(values.dtype.element_ty), there)
    gl.store(lse + to, top * LN2 + gl.log(total), mask=token >= 0)


@gluon.jit
def forward_kernel(q, k, v, boxes, out, lists, masks, work, group, score, tiles, flags, C: gl.constexpr):
    """Out [B, Hq, n, real] and LSE float32 [B, Hq, n], for the query blocks of all samples and heads.

    q, k, v: descriptors of [B, H, rows, D] with tiles [1, 1, 64 or keys, D], or as `boxes.Seen` says where the entry of
    `boxes` (for q, k, v) is not None. What lies beyond the tensor reads as 0.
    out: (values, LSE, row of the token order or None where slots are tokens, n). masks: as in `words_of`.
    group: query heads a head of k. tiles: B * Hq * query blocks. flags: two of int32 [1], nothing is done where the
    first holds 0, and the second becomes 1 where the result holds what is not finite; None for neither.
    """
    KEYS: gl.constexpr = C.keys
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    STAGES: gl.constexpr = C.stages
    QUERIES: gl.constexpr = C.queries
    REGISTERS: gl.constexpr = C.registers
    PARTS: gl.constexpr = C.rows // 64
    if flags[0] is not None:
        tiles = gl.where(gl.load(flags[0]) != 0, tiles, 0)
    qs = gl.allocate_shared_memory(q.dtype, [QUERIES * PARTS] + q.block_type.shape, q.layout)
    PIECES: gl.constexpr = KEYS * D * STAGES // k.block_type.numel
    PIECES_V: gl.constexpr = KEYS * DV * STAGES // v.block_type.numel
    ks = gl.allocate_shared_memory(k.dtype, [PIECES] + k.block_type.shape, k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [PIECES_V] + v.block_type.shape, v.layout)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], one)
    q_free = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], one)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    for i in gl.static_range(QUERIES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=PARTS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=PARTS)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=PARTS)
    whole_k = ks._reinterpret(k.dtype, [STAGES, KEYS, D], layouts.tile(KEYS, D, k.dtype))
    whole_v = vs._reinterpret(v.dtype, [STAGES, KEYS, DV], layouts.tile(KEYS, DV, v.dtype))
    ready = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    loads = (q, k, v, boxes, (qs, ks, vs), ready, lists, work, group, tiles)
    mine = ((qs, whole_k, whole_v), ready, lists, masks, out, work, score, tiles, flags[1])
    if PARTS == 2:
        gl.warp_specialize(
            [(attend, (mine, 0, C)), (attend, (mine, 1, C)), (fetch, (loads, C))], [4, 1], [REGISTERS, 32]
        )
    else:
        gl.warp_specialize([(attend, (mine, 0, C)), (fetch, (loads, C))], [1], [32])
