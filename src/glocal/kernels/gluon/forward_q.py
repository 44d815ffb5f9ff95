"""Block-sparse attention forward on Hopper: online softmax (arXiv 2205.14135) in the manner of FlashAttention-3
(arXiv 2407.08608). One warp fetches keys and values by TMA; each group of four warps holds 64 query rows and runs the
softmax of one key block while the tensor cores work on the products of the next.

Tuples that travel together: `lists` is (row of `owner`, full, partial, number of the mask that hides nothing), where
full is (counts, key blocks, width) and partial has mask numbers besides; `work` is (`launch.tiles_of` or None, query
heads, query blocks); `score` is (scale, soft-cap or None); a plan row is (pointer, stride of samples, stride of
heads, query heads a plan head); the `boxes` of a tensor are None where its rows lie in plan order, else
(corners, lead) of `boxes.Boxes` and `boxes.Seen`. C is a `tuning.Shape`, known when the kernel is compiled.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from glocal.kernels.gluon import layouts
from glocal.kernels.gluon.forward_fetch import after, fetch
from glocal.kernels.gluon.forward_lists import block_of, entry_of, head_of, masks_of, row_of
from glocal.kernels.gluon.forward_tile import capped, factor, opened, packed, scores, weigh
from glocal.kernels.gluon.masks import hidden, load_words, pad_words

LN2 = gl.constexpr(0.6931471805599453)


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
def opening(s, word, score, dtype: gl.constexpr, C: gl.constexpr, HIDES: gl.constexpr):
    """Weights, ready to be multiplied, largest logit and sums of the first step, from its logits."""
    KEYS: gl.constexpr = C.keys
    s = capped(s, score)
    if HIDES:
        s = hidden(s, word, KEYS)
    top = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, layouts.products(KEYS)))
    total = gl.zeros([64, 4], gl.float32, layout=layouts.words(KEYS))
    p, top, total, _ = weigh(s, top, total, factor(score), KEYS)
    return packed(p, dtype, KEYS), top, total


@gluon.jit
def rest(
    p, top, total, slots, q, shared, ready, lists, masks, line, at, score,
    PART: gl.constexpr, C: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """All steps of a query block after the first; the values of the last are still to be summed."""
    DV: gl.constexpr = C.dv
    acc = gl.zeros([64, DV], gl.float32, layout=layouts.products(DV))
    count = line[4]
    hiding = count if masks[1] is not None else line[3]
    if HIDES:
        last = gl.maximum(hiding - 1, 0)
        ahead = gl.minimum(1, last)
        word = words_of(lists, masks, line, ahead, masks_of(lists, line, ahead, C), at, PART * 64, C)
        numbers = masks_of(lists, line, gl.minimum(2, last), C)
        for i in range(1, hiding):
            mine = word
            word = words_of(lists, masks, line, gl.minimum(i + 1, last), numbers, at, PART * 64, C)
            numbers = masks_of(lists, line, gl.minimum(i + 2, last), C)
            acc, p, top, total, slots = advance(acc, p, top, total, slots, q, shared, ready, mine, score, C, True)
    for _ in range(gl.maximum(hiding, 1), count):
        acc, p, top, total, slots = advance(acc, p, top, total, slots, q, shared, ready, None, score, C, False)
    return acc, p, top, total, slots


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
    zero = gl.to_tensor(0)
    slots = (zero, zero, zero, zero)  # slot and phase of keys, of values
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    at, line = head_of(gl.program_id(0), lists, work, C)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        coming = gl.minimum(tile + gl.num_programs(0), tiles - 1)
        if line[4] > 0:
            k_slot, k_phase, v_slot, v_phase = slots
            word = None
            if HIDES:
                word = words_of(lists, masks, line, 0, masks_of(lists, line, 0, C), at, PART * 64, C)
            mbarrier.wait(q_ready.index(q_slot), q_phase)
            q = shared[0].index(q_slot * PARTS + PART).reshape([64, D])
            if C.held:
                q = q.load(layouts.operand(KEYS))
                mbarrier.arrive(q_free.index(q_slot))
            mbarrier.wait(k_ready.index(k_slot), k_phase)
            s = warpgroup_mma_wait(0, deps=[scores(q, shared[1], k_slot, KEYS)])
            mbarrier.arrive(k_free.index(k_slot))
            k_slot, k_phase = after(k_slot, k_phase, STAGES)
            p, top, total = opening(s, word, score, shared[2].dtype, C, HIDES)
            slots = (k_slot, k_phase, v_slot, v_phase)
            acc, p, top, total, slots = rest(
                p, top, total, slots, q, shared, ready, lists, masks, line, at, score, PART, C, HIDES
            )
            k_slot, k_phase, v_slot, v_phase = slots
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            left = opened(p, shared[2].dtype, KEYS, DV)
            acc = warpgroup_mma(left, shared[2].index(v_slot), acc, is_async=True)
            if not C.held:
                mbarrier.arrive(q_free.index(q_slot))
            next_at, line = head_of(coming, lists, work, C)  # while the last product is made
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_free.index(v_slot))
            v_slot, v_phase = after(v_slot, v_phase, STAGES)
            slots = (k_slot, k_phase, v_slot, v_phase)
            q_slot, q_phase = after(q_slot, q_phase, QUERIES)
        else:
            top = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, layouts.products(KEYS)))
            total = gl.zeros([64, 4], gl.float32, layout=layouts.words(KEYS))
            acc = gl.zeros([64, DV], gl.float32, layout=layouts.products(DV))
            next_at, line = head_of(coming, lists, work, C)
        put(acc, top, total, out, at, at[2] * ROWS + PART * 64, work[1], ill, C)
        at = next_at


@gluon.jit
def attend_on(mine, PART: gl.constexpr, C: gl.constexpr):
    """`attend` where every query block has a key block: the first product of the next query block is made beside the
    last one of this, and while its rows are written. After the last query block that product is made for nothing.
    """
    shared, ready, lists, masks, out, work, score, tiles, ill = mine
    ROWS: gl.constexpr = C.rows
    KEYS: gl.constexpr = C.keys
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    STAGES: gl.constexpr = C.stages
    QUERIES: gl.constexpr = C.queries
    PARTS: gl.constexpr = ROWS // 64
    HIDES: gl.constexpr = C.masked or C.keys > C.block or masks[1] is not None
    q_ready, q_free, k_ready, k_free, v_ready, v_free = ready
    zero = gl.to_tensor(0)
    q_slot, q_phase = zero, zero
    at, line = head_of(gl.program_id(0), lists, work, C)
    word = None
    if HIDES:
        word = words_of(lists, masks, line, 0, masks_of(lists, line, 0, C), at, PART * 64, C)
    mbarrier.wait(q_ready.index(0), 0)
    mbarrier.wait(k_ready.index(0), 0)
    q = shared[0].index(PART).reshape([64, D])
    s = warpgroup_mma_wait(0, deps=[scores(q, shared[1], 0, KEYS)])
    mbarrier.arrive(k_free.index(0))
    p, top, total = opening(s, word, score, shared[2].dtype, C, HIDES)
    k_slot, k_phase = after(zero, zero, STAGES)
    slots = (k_slot, k_phase, zero, zero)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        coming = gl.minimum(tile + gl.num_programs(0), tiles - 1)
        next_at, next_line = head_of(coming, lists, work, C)
        q = shared[0].index(q_slot * PARTS + PART).reshape([64, D])
        acc, p, top, total, slots = rest(
            p, top, total, slots, q, shared, ready, lists, masks, line, at, score, PART, C, HIDES
        )
        k_slot, k_phase, v_slot, v_phase = slots
        mbarrier.wait(v_ready.index(v_slot), v_phase)
        left = opened(p, shared[2].dtype, KEYS, DV)
        acc = warpgroup_mma(left, shared[2].index(v_slot), acc, is_async=True)
        mbarrier.arrive(q_free.index(q_slot))
        q_slot, q_phase = after(q_slot, q_phase, QUERIES)
        line = next_line
        if HIDES:
            word = words_of(lists, masks, line, 0, masks_of(lists, line, 0, C), next_at, PART * 64, C)
        mbarrier.wait(q_ready.index(q_slot), q_phase)
        mbarrier.wait(k_ready.index(k_slot), k_phase)
        q = shared[0].index(q_slot * PARTS + PART).reshape([64, D])
        s = scores(q, shared[1], k_slot, KEYS)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(v_free.index(v_slot))
        put(acc, top, total, out, at, at[2] * ROWS + PART * 64, work[1], ill, C)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_free.index(k_slot))
        p, top, total = opening(s, word, score, shared[2].dtype, C, HIDES)
        k_slot, k_phase = after(k_slot, k_phase, STAGES)
        v_slot, v_phase = after(v_slot, v_phase, STAGES)
        slots = (k_slot, k_phase, v_slot, v_phase)
        at = next_at


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
    to = (at[0].to(gl.int64) * heads + at[1]) * n + token
    gl.store(lse + to, top * LN2 + gl.log(total), mask=token >= 0)
    acc = acc.to(values.dtype.element_ty)
    if DV >= 32:  # whole sectors of memory at once
        row: gl.constexpr = gl.SliceLayout(1, layouts.lines(DV))
        column = gl.arange(0, DV, layout=gl.SliceLayout(0, layouts.lines(DV)))
        acc = gl.convert_layout(acc, layouts.lines(DV))
        to, token = gl.convert_layout(to, row), gl.convert_layout(token, row)
    else:
        column = gl.arange(0, DV, layout=gl.SliceLayout(0, wide))
    there = gl.expand_dims(token >= 0, 1) & gl.expand_dims(column < REAL, 0)
    gl.store(values + gl.expand_dims(to * REAL, 1) + gl.expand_dims(column, 0), acc, there)


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
    if C.joined:
        gl.warp_specialize(
            [(attend_on, (mine, 0, C)), (attend_on, (mine, 1, C)), (fetch, (loads, C))], [4, 1], [REGISTERS, 32]
        )
    elif PARTS == 2:
        gl.warp_specialize(
            [(attend, (mine, 0, C)), (attend, (mine, 1, C)), (fetch, (loads, C))], [4, 1], [REGISTERS, 32]
        )
    else:
        gl.warp_specialize([(attend, (mine, 0, C)), (fetch, (loads, C))], [1], [32])
