"""Attention over 8-bit tiles on Hopper: one warp fetches tiles by TMA, each group of four warps holds 64 query rows and
weighs the logits of one key block while the tensor cores work on its products of the next (arXiv 2407.08608).

Weights in fp8 stay where the accumulators left them: values were stored in the order of keys that makes these registers
the left operand of the second product.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.runtime.jit import constexpr_function

from glocal.kernels.gluon.forward_fetch import after
from glocal.kernels.gluon.forward_lists import row_of
from glocal.kernels.gluon.masks import hidden, load_words
from glocal.kernels.gluon.powers import powers

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
PACK = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
    "mov.b32 $0, {a, b}; }"
)


@constexpr_function
def products(columns, bits):
    """Accumulators [64, columns] of one group; bits of what is multiplied."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 256 // bits])


@constexpr_function
def operand(columns, bits):
    """Left operands [64, any] in registers, for accumulators [64, columns]."""
    return gl.DotOperandLayout(0, products(columns, bits), 32 // bits)


@gluon.jit
def listed(lists, sizes, tile):
    """Sample, head and query block of a tile; row of its lists; entries in the partial and in the full one."""
    member = tile // sizes[1]
    b, h, block = member // sizes[0], member % sizes[0], tile % sizes[1]
    place = gl.load(row_of(lists[0], b, h)).to(gl.int64) * sizes[1] + block
    return b, h, block, place, gl.load(lists[2][0] + place), gl.load(lists[1][0] + place)


@gluon.jit
def entry(lists, place, full, i):
    """Key block of entry i; full entries come first, as in the definition: rounded weights depend on the order."""
    full_at = lists[1][1] + place * lists[1][2] + i
    part_at = lists[2][1] + place * lists[2][2] + (i - full)
    return gl.load(gl.where(i < full, full_at, part_at))


@gluon.jit
def fetch_one(t, at, ring, ready, free, slot, phase, STAGES: gl.constexpr):
    """One tile as soon as its slot is free."""
    mbarrier.wait(free.index(slot), phase)
    mbarrier.expect(ready.index(slot), t.block_type.nbytes)
    tma.async_copy_global_to_shared(t, at, ready.index(slot), ring.index(slot))
    return after(slot, phase, STAGES)


@gluon.jit
def fetch(given, BQ: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, TURNED: gl.constexpr):
    """The warp that fetches: queries of a tile once, keys and values of its list into rings of STAGES."""
    q, k, v, shared, ready, lists, sizes = given
    PARTS: gl.constexpr = BQ // 64
    DV: gl.constexpr = v.block_type.shape[0] if TURNED else v.block_type.shape[1]
    q_ready, q_free, k_ready, k_free, v_ready, v_free = ready
    k_slot, k_phase = gl.to_tensor(0), gl.to_tensor(1)  # the first round waits for nobody
    v_slot, v_phase = gl.to_tensor(0), gl.to_tensor(1)
    q_phase = gl.to_tensor(1)
    heads, blocks, group, room, tiles = sizes
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, block, place, part, full = listed(lists, sizes, tile)
        count = part + full
        if count > 0:
            head = b * (heads // group) + h // group
            mine = entry(lists, place, full, 0)
            k_slot, k_phase = fetch_one(
                k, [head * room + mine * BK, 0], shared[1], k_ready, k_free, k_slot, k_phase, STAGES
            )
            mbarrier.wait(q_free, q_phase)
            mbarrier.expect(q_ready, q.block_type.nbytes * PARTS)
            for i in gl.static_range(PARTS):
                row = ((b * heads + h) * blocks + block) * BQ + i * 64
                tma.async_copy_global_to_shared(q, [row, 0], q_ready, shared[0].index(i))
            q_phase = q_phase ^ 1
            for i in range(1, count + 1):
                coming = mine
                if i < count:
                    coming = entry(lists, place, full, i)
                    k_slot, k_phase = fetch_one(
                        k, [head * room + coming * BK, 0], shared[1], k_ready, k_free, k_slot, k_phase, STAGES
                    )
                if TURNED:
                    at = [head * DV, mine * BK]
                else:
                    at = [head * room + mine * BK, 0]
                v_slot, v_phase = fetch_one(v, at, shared[2], v_ready, v_free, v_slot, v_phase, STAGES)
                mine = coming


@gluon.jit
def scores(q, ks, slot, BK: gl.constexpr, WHOLE: gl.constexpr):
    """Start q k^T, [64, BK]."""
    kind: gl.constexpr = gl.int32 if WHOLE else gl.float32
    blank = gl.zeros([64, BK], kind, layout=products(BK, 8))
    return warpgroup_mma(q, ks.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)


@gluon.jit
def weigh(s, top, total, factor, SHIFT: gl.constexpr, EMULATE: gl.constexpr):
    """Fold logits s [64, keys], times `factor` in powers of two, into the largest logit and sum of weights of each row.

    Returns weights times 2^SHIFT, largest logit, sum, and the factor for what was summed before.
    """
    new = gl.maximum(top, gl.max(s, 1) * factor)
    base = gl.where(new == float("-inf"), 0.0, new)
    p = powers(s * gl.expand_dims(factor, 1) - gl.expand_dims(base - SHIFT, 1), EMULATE)
    old = gl.exp2(top - base)
    return p, new, total * old + gl.sum(p, 1), old


@gluon.jit
def packed(p, kind: gl.constexpr, BK: gl.constexpr, DV: gl.constexpr):
    """Weights [64, BK] as the left operand of the second product keeps them. In 8 bits no register moves: keys change
    places, and four weights make a word, int32 [64, BK / 16, 4]. Carried through a loop as single numbers they would be
    taken apart and put together in every round.
    """
    if kind.primitive_bitwidth == 8:
        # A lane owns keys 8 i + 2 c + j of 16 and multiplies places 4 c + 2 i + j.
        even, odd = gl.split(gl.permute(gl.reshape(p, [64, BK // 16, 2, 4, 2]), (0, 1, 3, 2, 4)))
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        return gl.inline_asm_elementwise(PACK, "=r,f,f,f,f", [first, second, third, fourth], gl.int32, True, 1)
    else:
        return gl.convert_layout(p.to(kind), operand(DV, 16))


@gluon.jit
def opened(p, kind: gl.constexpr, BK: gl.constexpr, DV: gl.constexpr):
    """The left operand that `packed` packed."""
    if kind.primitive_bitwidth == 8:
        even = gl.join(p.to(gl.int8), (p >> 16).to(gl.int8))
        odd = gl.join((p >> 8).to(gl.int8), (p >> 24).to(gl.int8))
        p = gl.reshape(gl.join(even, odd), [64, BK]).to(kind, bitcast=True)
        return gl.convert_layout(p, operand(DV, 8), assert_trivial=True)
    else:
        return p


@gluon.jit
def attend(given, PART: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, EXTRA: gl.constexpr):
    """One group of four warps: rows 64 * PART .. 64 * PART + 63 of every query block."""
    shared, ready, lists, sizes, scales, table, out = given
    q_ready, q_free, k_ready, k_free, v_ready, v_free = ready
    Q_GROUP: gl.constexpr = EXTRA[0]
    K_GROUP: gl.constexpr = EXTRA[1]
    WHOLE: gl.constexpr = EXTRA[2]
    TURNED: gl.constexpr = EXTRA[3]
    SHIFT: gl.constexpr = EXTRA[4]
    MASKED: gl.constexpr = EXTRA[5]
    EMULATE: gl.constexpr = 0 if MASKED else EXTRA[6]  # it makes 2^-126 of minus infinity
    DV: gl.constexpr = shared[2].shape[1] if TURNED else shared[2].shape[2]
    BITS: gl.constexpr = 8 if TURNED else 16
    kind: gl.constexpr = shared[2].dtype
    near: gl.constexpr = gl.SliceLayout(1, products(BK, 8))
    wide: gl.constexpr = products(DV, BITS)
    side: gl.constexpr = gl.SliceLayout(1, wide)
    heads, blocks, group, room, tiles = sizes
    k_slot, k_phase = gl.to_tensor(0), gl.to_tensor(0)
    v_slot, v_phase = gl.to_tensor(0), gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, block, place, part, full = listed(lists, sizes, tile)
        count = part + full
        head = b * (heads // group) + h // group
        first = (b * heads + h) * (blocks * BQ) + block * BQ + PART * 64
        mine = gl.load(scales[0] + (first + gl.arange(0, 64, layout=near)) // Q_GROUP) * (scales[3] * LOG2E)
        top = gl.full([64], float("-inf"), gl.float32, layout=near)
        total = gl.zeros([64], gl.float32, layout=near)
        acc = gl.zeros([64, DV], gl.float32, layout=wide)
        if count > 0:
            key = gl.load(scales[1] + (head * room + entry(lists, place, full, 0) * BK) // K_GROUP)
            second = entry(lists, place, full, gl.minimum(1, count - 1))
            coming = gl.load(scales[1] + (head * room + second * BK) // K_GROUP)
            mbarrier.wait(q_ready, q_phase)
            q = shared[0].index(PART)
            mbarrier.wait(k_ready.index(k_slot), k_phase)
            s = warpgroup_mma_wait(0, deps=[scores(q, shared[1], k_slot, BK, WHOLE)])
            mbarrier.arrive(k_free.index(k_slot))
            k_slot, k_phase = after(k_slot, k_phase, STAGES)
            s = s.to(gl.float32)
            if MASKED:
                mask = gl.load(lists[2][3] + place * lists[2][2], mask=full == 0, other=lists[3])
                s = hidden_here(s, load_words(table, mask, PART * 64, BQ, BK), BK)
            p, top, total, _ = weigh(s, top, total, mine * key, SHIFT, EMULATE)
            p = packed(p, kind, BK, DV)
            for i in range(1, count):
                key = coming  # a scale is read one block ahead: that takes as long as a product
                ahead = entry(lists, place, full, gl.minimum(i + 1, count - 1))
                coming = gl.load(scales[1] + (head * room + ahead * BK) // K_GROUP)
                mbarrier.wait(k_ready.index(k_slot), k_phase)
                s = scores(q, shared[1], k_slot, BK, WHOLE)
                mbarrier.wait(v_ready.index(v_slot), v_phase)
                left = opened(p, kind, BK, DV)
                acc = warpgroup_mma(left, values(shared[2], v_slot, TURNED), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_free.index(k_slot))
                s = s.to(gl.float32)
                if MASKED:  # noqa: SIM102 - known when compiled
                    if i >= full:
                        mask = gl.load(lists[2][3] + place * lists[2][2] + (i - full))
                        s = hidden_here(s, load_words(table, mask, PART * 64, BQ, BK), BK)
                weights, top, total, old = weigh(s, top, total, mine * key, SHIFT, EMULATE)
                acc, weights = warpgroup_mma_wait(
                    0, deps=[acc, weights]
                )  # before it, none may take the place of `left`
                mbarrier.arrive(v_free.index(v_slot))
                k_slot, k_phase = after(k_slot, k_phase, STAGES)
                v_slot, v_phase = after(v_slot, v_phase, STAGES)
                acc = acc * gl.expand_dims(gl.convert_layout(old, side), 1)
                p = packed(weights, kind, BK, DV)
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            left = opened(p, kind, BK, DV)
            acc = warpgroup_mma(left, values(shared[2], v_slot, TURNED), acc, is_async=True)
            mbarrier.arrive(q_free)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_free.index(v_slot))
            v_slot, v_phase = after(v_slot, v_phase, STAGES)
            q_phase = q_phase ^ 1
        top, total = gl.convert_layout(top, side), gl.convert_layout(total, side)
        acc = acc * gl.expand_dims(1.0 / gl.where(total == 0, 1.0, total), 1)
        column = gl.arange(0, DV, layout=gl.SliceLayout(0, wide))
        if TURNED:
            acc = acc * gl.expand_dims(gl.load(scales[2] + head * DV + column), 0)
        row = (first + gl.arange(0, 64, layout=side)).to(gl.int64)
        gl.store(out[0] + gl.expand_dims(row * DV, 1) + gl.expand_dims(column, 0), acc.to(out[0].dtype.element_ty))
        gl.store(out[1] + row, gl.where(total == 0, float("-inf"), (top + gl.log2(total) - SHIFT) * LN2))


@gluon.jit
def values(ring, slot, TURNED: gl.constexpr):
    """Values [BK, DV] of a slot; by channel they are turned."""
    if TURNED:
        return ring.index(slot).permute((1, 0))
    else:
        return ring.index(slot)


@gluon.jit
def hidden_here(s, word, BK: gl.constexpr):
    """s with -inf where the words have no bit; accumulators of 8-bit products lie as those of 16 bits do."""
    usual: gl.constexpr = products(BK, 16)
    s = hidden(gl.convert_layout(s, usual, assert_trivial=True), word, BK)
    return gl.convert_layout(s, products(BK, 8), assert_trivial=True)


@gluon.jit
def hopper_kernel(
    q, k, v, out, lists, table, scales, sizes,
    BQ: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, EXTRA: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out: (values [B, Hq, rows, DV], LSE [B, Hq, rows]) by slot.

    q, k: descriptors of 8-bit rows, tiles [64 or BK, D]. v: tiles [DV, BK] in fp8, or [BK, DV].
    lists: (row of `owner`, (counts, key blocks, width), (counts, key blocks, width, masks), number of the mask that
    hides nothing). table: words of `masks.by_query`. scales: (of queries, of keys, of channels, of logits).
    sizes: query heads, query blocks, query heads a key head, key slots, tiles.
    EXTRA: (queries a scale, keys a scale, int8, values by channel, SHIFT, some block is partial, EMULATE of `powers`).
    """
    PARTS: gl.constexpr = BQ // 64
    one: gl.constexpr = mbarrier.MBarrierLayout()
    D: gl.constexpr = q.block_type.shape[1]
    V_ROWS: gl.constexpr = v.block_type.shape[0]
    V_COLUMNS: gl.constexpr = v.block_type.shape[1]
    qs = gl.allocate_shared_memory(q.dtype, [PARTS, 64, D], q.layout)
    ks = gl.allocate_shared_memory(k.dtype, [STAGES, BK, D], k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [STAGES, V_ROWS, V_COLUMNS], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], one)
    q_free = gl.allocate_shared_memory(gl.int64, [1], one)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=PARTS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=PARTS)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=PARTS)
    shared = (qs, ks, vs)
    ready = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    TURNED: gl.constexpr = EXTRA[3]
    loads = (q, k, v, shared, ready, lists, sizes)
    mine = (shared, ready, lists, sizes, scales, table, out)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (attend, (mine, 0, BQ, BK, STAGES, EXTRA)),
                (attend, (mine, 1, BQ, BK, STAGES, EXTRA)),
                (fetch, (loads, BQ, BK, STAGES, TURNED)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [(attend, (mine, 0, BQ, BK, STAGES, EXTRA)), (fetch, (loads, BQ, BK, STAGES, TURNED))], [1], [24]
        )
