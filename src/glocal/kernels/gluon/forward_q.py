"""Block-sparse attention forward on Hopper: online softmax (arXiv 2205.14135) in the manner of FlashAttention-3
(arXiv 2407.08608). One warp fetches keys and values by TMA; each group of four warps holds 64 query rows and runs the
softmax of one key block while the tensor cores work on the products of the next.

Tuples that travel together: `lists` is (row of `owner`, full, partial, number of the mask that hides nothing), where
full is (counts, key blocks, width) and partial has mask numbers besides; `work` is (order of the query blocks or None,
query heads, query blocks); `score` is (scale, soft-cap or None); a plan row is (pointer, stride of samples, stride of
heads, query heads a plan head). C is a `tuning.Shape`, known when the kernel is compiled.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from glocal.kernels.gluon import layouts
from glocal.kernels.gluon.masks import hidden, load_words, pad_words

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


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
def lengths(lists, b, h, block, blocks, STEPS: gl.constexpr):
    """The row of a query block in the lists, its partial steps and all its steps; a key block takes STEPS of them."""
    place = gl.load(row_of(lists[0], b, h)).to(gl.int64) * blocks + block
    part = gl.load(lists[2][0] + place)
    return place, part * STEPS, (part + gl.load(lists[1][0] + place)) * STEPS


@gluon.jit
def block_of(lists, place, part, step, STEPS: gl.constexpr):
    """Key block of a step; partial blocks come first."""
    full_at = lists[1][1] + place * lists[1][2] + (step - part) // STEPS
    part_at = lists[2][1] + place * lists[2][2] + step // STEPS
    return gl.load(gl.where(step < part, part_at, full_at))


@gluon.jit
def mask_of(lists, place, part, step, STEPS: gl.constexpr):
    """Mask number of a step."""
    return gl.load(lists[2][3] + place * lists[2][2] + step // STEPS, mask=step < part, other=lists[3])


@gluon.jit
def after(slot, phase, COUNT: gl.constexpr):
    """The slot after `slot` in a ring of COUNT, and its phase."""
    last = slot == COUNT - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def fetch(loads, C: gl.constexpr):
    """The warp that fetches: the queries of a tile once, keys and values of its list into rings."""
    ROWS: gl.constexpr = C.rows
    KEYS: gl.constexpr = C.keys
    BLOCK: gl.constexpr = C.block
    QUERIES: gl.constexpr = C.queries
    q, k, v, shared, ready, lists, work, group, tiles = loads
    PARTS: gl.constexpr = ROWS // 64
    STEPS: gl.constexpr = BLOCK // KEYS
    STAGES: gl.constexpr = C.stages
    BYTES: gl.constexpr = q.block_type.nbytes * PARTS
    qs, ks, vs = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free = ready
    k_slot, k_phase = gl.to_tensor(0), gl.to_tensor(1)  # the first round waits for nobody
    v_slot, v_phase = gl.to_tensor(0), gl.to_tensor(1)
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, block = place_of(tile, work)
        place, part, count = lengths(lists, b, h, block, work[2], STEPS)
        if count > 0:
            kv_head = h // group
            mine = block_of(lists, place, part, 0, STEPS) * BLOCK
            k_slot, k_phase = fetch_one(k, ks, k_ready, k_free, b, kv_head, mine, k_slot, k_phase, STAGES)
            mbarrier.wait(q_free.index(q_slot), q_phase)
            mbarrier.expect(q_ready.index(q_slot), BYTES)
            for i in gl.static_range(PARTS):
                to = qs.index(q_slot * PARTS + i)
                tma.async_copy_global_to_shared(q, [b, h, block * ROWS + i * 64, 0], q_ready.index(q_slot), to)
            q_slot, q_phase = after(q_slot, q_phase, QUERIES)
            for i in range(1, count):
                coming = block_of(lists, place, part, i, STEPS) * BLOCK + i % STEPS * KEYS
                k_slot, k_phase = fetch_one(k, ks, k_ready, k_free, b, kv_head, coming, k_slot, k_phase, STAGES)
                v_slot, v_phase = fetch_one(v, vs, v_ready, v_free, b, kv_head, mine, v_slot, v_phase, STAGES)
                mine = coming
            v_slot, v_phase = fetch_one(v, vs, v_ready, v_free, b, kv_head, mine, v_slot, v_phase, STAGES)


@gluon.jit
def fetch_one(t, ring, ready, free, b, h, row, slot, phase, STAGES: gl.constexpr):
    """One tile of keys or values as soon as its slot is free."""
    mbarrier.wait(free.index(slot), phase)
    mbarrier.expect(ready.index(slot), t.block_type.nbytes)
    tma.async_copy_global_to_shared(t, [b, h, row, 0], ready.index(slot), ring.index(slot))
    return after(slot, phase, STAGES)


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
def scores(q, ks, slot, BK: gl.constexpr, D: gl.constexpr):
    """Start q k^T, [64, BK]."""
    blank = gl.zeros([64, BK], gl.float32, layout=layouts.products(BK))
    return warpgroup_mma(q, ks.index(slot).reshape([BK, D]).permute((1, 0)), blank, use_acc=False, is_async=True)


@gluon.jit
def advance(
    acc, p, top, total, slots, q, shared, ready, word, score,
    C: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """One step: the values of the step before are summed while the logits of this one are weighed."""
    KEYS: gl.constexpr = C.keys
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    STAGES: gl.constexpr = C.stages
    k_slot, k_phase, v_slot, v_phase = slots
    k_ready, k_free, v_ready, v_free = ready[2], ready[3], ready[4], ready[5]
    wide: gl.constexpr = layouts.products(DV)
    mbarrier.wait(k_ready.index(k_slot), k_phase)
    s = scores(q, shared[1], k_slot, KEYS, D)
    mbarrier.wait(v_ready.index(v_slot), v_phase)
    acc = warpgroup_mma(p, shared[2].index(v_slot).reshape([KEYS, DV]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(k_slot))
    s = capped(s, score)
    if HIDES:
        s = hidden(s, word, KEYS)
    weights, top, total, old = weigh(s, top, total, factor(score), KEYS)
    weights = weights.to(shared[2].dtype)
    if C.pinned:  # the barrier is known to be passed, but no instruction is moved across its loop
        mbarrier.wait(v_ready.index(v_slot), v_phase)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_free.index(v_slot))
    k_slot, k_phase = after(k_slot, k_phase, STAGES)
    v_slot, v_phase = after(v_slot, v_phase, STAGES)
    acc = acc * gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, wide)), 1)
    p = gl.convert_layout(weights, layouts.operand(DV))
    return acc, p, top, total, (k_slot, k_phase, v_slot, v_phase)


@gluon.jit
def words_of(lists, masks, place, part, step, mask, at, first, C: gl.constexpr):
    """Words of a step: its part of a mask, without the pads of its key block where there may be any.

    masks: (words of `masks.by_query`, plan row of words of `masks.kept` or None).
    """
    ROWS: gl.constexpr = C.rows
    KEYS: gl.constexpr = C.keys
    BLOCK: gl.constexpr = C.block
    STEPS: gl.constexpr = BLOCK // KEYS
    word = load_words(masks[0], mask, first, ROWS, KEYS)
    if masks[1] is not None:
        block = block_of(lists, place, part, step, STEPS)
        word = word & pad_words(row_of(masks[1], at[0], at[1]) + block * 4, KEYS)
    return word >> (step % STEPS * (KEYS // 4))


@gluon.jit
def attend(mine, PART: gl.constexpr, C: gl.constexpr):
    """One group of four warps: rows 64 * PART .. 64 * PART + 63 of every query block."""
    ROWS: gl.constexpr = C.rows
    KEYS: gl.constexpr = C.keys
    BLOCK: gl.constexpr = C.block
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    STAGES: gl.constexpr = C.stages
    QUERIES: gl.constexpr = C.queries
    shared, ready, lists, masks, out, work, score, tiles = mine
    PARTS: gl.constexpr = ROWS // 64
    STEPS: gl.constexpr = BLOCK // KEYS
    HIDES: gl.constexpr = C.masked or masks[1] is not None
    q_ready, q_free, k_ready, k_free, v_ready, v_free = ready
    row: gl.constexpr = gl.SliceLayout(1, layouts.products(KEYS))
    zero = gl.to_tensor(0)
    slots = (zero, zero, zero, zero)  # slot and phase of keys, of values
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, block = place_of(tile, work)
        place, part, count = lengths(lists, b, h, block, work[2], STEPS)
        hiding = count if masks[1] is not None else part
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
            s = warpgroup_mma_wait(0, deps=[scores(q, shared[1], k_slot, KEYS, D)])
            mbarrier.arrive(k_free.index(k_slot))
            k_slot, k_phase = after(k_slot, k_phase, STAGES)
            s = capped(s, score)
            if HIDES:
                mask = mask_of(lists, place, part, 0, STEPS)
                s = hidden(s, words_of(lists, masks, place, part, 0, mask, (b, h), PART * 64, C), KEYS)
            p, top, total, _ = weigh(s, top, total, factor(score), KEYS)
            p = gl.convert_layout(p.to(shared[2].dtype), layouts.operand(DV))
            slots = (k_slot, k_phase, v_slot, v_phase)
            if HIDES:
                mask = mask_of(lists, place, part, 1, STEPS)
                for i in range(1, hiding):
                    word = words_of(lists, masks, place, part, i, mask, (b, h), PART * 64, C)
                    mask = mask_of(lists, place, part, i + 1, STEPS)
                    acc, p, top, total, slots = advance(
                        acc, p, top, total, slots, q, shared, ready, word, score, C, True
                    )
            for _ in range(gl.maximum(hiding, 1), count):
                acc, p, top, total, slots = advance(acc, p, top, total, slots, q, shared, ready, None, score, C, False)
            k_slot, k_phase, v_slot, v_phase = slots
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            acc = warpgroup_mma(p, shared[2].index(v_slot).reshape([KEYS, DV]), acc, is_async=True)
            if not C.held:
                mbarrier.arrive(q_free.index(q_slot))
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(v_free.index(v_slot))
            v_slot, v_phase = after(v_slot, v_phase, STAGES)
            slots = (k_slot, k_phase, v_slot, v_phase)
            q_slot, q_phase = after(q_slot, q_phase, QUERIES)
        put(acc, top, total, out, (b, h, block), block * ROWS + PART * 64, work[1], C)


@gluon.jit
def put(acc, top, total, out, at, first, heads, C: gl.constexpr):
    """Write the rows of one group to their tokens."""
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
    column = gl.arange(0, DV, layout=gl.SliceLayout(0, wide))
    to = (at[0].to(gl.int64) * heads + at[1]) * n + token
    there = gl.expand_dims(token >= 0, 1) & gl.expand_dims(column < REAL, 0)
    gl.store(values + gl.expand_dims(to * REAL, 1) + gl.expand_dims(column, 0), acc.to(values.dtype.element_ty), there)
    gl.store(lse + to, top * LN2 + gl.log(total), mask=token >= 0)


@gluon.jit
def forward_kernel(q, k, v, out, lists, masks, work, group, score, tiles, C: gl.constexpr):
    """Out [B, Hq, n, real] and LSE float32 [B, Hq, n], for the query blocks of all samples and heads.

    q, k, v: descriptors of [B, H, rows, D] with tiles [1, 1, 64 or keys, D]; what lies beyond the tensor reads as 0.
    out: (values, LSE, row of the token order or None where slots are tokens, n). masks: as in `words_of`.
    group: query heads a head of k. tiles: B * Hq * query blocks.
    """
    KEYS: gl.constexpr = C.keys
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    STAGES: gl.constexpr = C.stages
    QUERIES: gl.constexpr = C.queries
    REGISTERS: gl.constexpr = C.registers
    PARTS: gl.constexpr = C.rows // 64
    qs = gl.allocate_shared_memory(q.dtype, [QUERIES * PARTS, 1, 1, 64, D], q.layout)
    ks = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, KEYS, D], k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, KEYS, DV], v.layout)
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
    shared = (qs, ks, vs)
    ready = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    loads = (q, k, v, shared, ready, lists, work, group, tiles)
    mine = (shared, ready, lists, masks, out, work, score, tiles)
    if PARTS == 2:
        gl.warp_specialize(
            [(attend, (mine, 0, C)), (attend, (mine, 1, C)), (fetch, (loads, C))], [4, 1], [REGISTERS, 24]
        )
    else:
        gl.warp_specialize([(attend, (mine, 0, C)), (fetch, (loads, C))], [1], [24])
