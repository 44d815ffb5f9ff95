"""Gradients of keys and values on Hopper: one key block and the query blocks that list it, over all its query heads.

One warp brings queries and gradients of the output through TMA. Each group of four warps computes S^T = K Q^T and
dP^T = V dO^T for 64 keys of its own, then dV += P^T dO and dK += dS^T Q with P and dS in registers. With WHOLE the same
pass makes the gradients of the queries too, five products instead of seven: two groups pass dS to one another through a
ring of two places in shared memory, each multiplies the dS of one step before with half of the columns of all keys, and
TMA adds the product to float32 sums. The order of these additions, hence the last bits, may differ from call to call.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from glocal.kernels.gluon.backward_tile import async_add, hide, load_words, products, store


@gluon.jit
def _tile(
    acc_k, acc_v, k, v, q, grad, end, delta, word, ring, turn, side, row, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr, WHOLE: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """acc_k, acc_v [BN, D] plus dS^T q and P^T dO of one query tile [BM, D].

    If WHOLE, dS^T of this tile goes into the ring and the gradients of the queries of the tile before come out. Where
    registers allow it, their products fill the time in which dS is made.
    """
    EARLY: gl.constexpr = D <= 64
    warps: gl.constexpr = BN // 16
    layout: gl.constexpr = products(warps, BM)
    left: gl.constexpr = gl.DotOperandLayout(0, products(warps, D), 2)
    none = gl.zeros([BN, BM], gl.float32, layout)
    s = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, grad.permute((1, 0)), none, use_acc=False, is_async=True)
    lse = gl.expand_dims(end.load(gl.SliceLayout(0, layout)), 0)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale - lse)
    if MASKED:
        p = hide(p, word, BN, BM)
    p = p.to(k.dtype)
    p_left = gl.convert_layout(p, left)
    acc_v = warpgroup_mma(p_left, grad, acc_v, is_async=True)
    drop = gl.expand_dims(delta.load(gl.SliceLayout(0, layout)), 0)
    if WHOLE and EARLY:
        dq = _products(ring, turn, side, BM, BN, D, GROUP)
        dp = warpgroup_mma_wait(3, deps=[dp])
    else:
        dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p.to(gl.float32) * (dp - drop)
    ds = ds.to(k.dtype)
    ds_left = gl.convert_layout(ds, left)
    acc_k = warpgroup_mma(ds_left, q, acc_k, is_async=True)
    if WHOLE:
        _put(ring, ds, turn, side, GROUP)
        if EARLY:
            acc_v, dq, _ = warpgroup_mma_wait(1, deps=[acc_v, dq, p_left])
            _add(ring, dq, turn, row, D, GROUP)
            acc_k, _ = warpgroup_mma_wait(0, deps=[acc_k, ds_left])
        else:
            dq = _products(ring, turn, side, BM, BN, D, GROUP)
            acc_k, acc_v, dq, _, _ = warpgroup_mma_wait(0, deps=[acc_k, acc_v, dq, p_left, ds_left])
            _add(ring, dq, turn, row, D, GROUP)
    else:
        acc_k, acc_v, _, _ = warpgroup_mma_wait(0, deps=[acc_k, acc_v, p_left, ds_left])
    return acc_k, acc_v


@gluon.jit
def _unseen(ring, turn, side, row, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr):
    """What is left of a step in which a group sees nothing: zeros into the ring, and the tile before comes out."""
    dtype: gl.constexpr = ring[0].dtype
    dq = _products(ring, turn, side, BM, BN, D, GROUP)
    _put(ring, gl.zeros([BN, BM], dtype, products(BN // 16, BM)), turn, side, GROUP)
    dq = warpgroup_mma_wait(0, deps=[dq])
    _add(ring, dq, turn, row, D, GROUP)


@gluon.jit
def _put(ring, ds, turn, side, GROUP: gl.constexpr):
    """dS^T of the keys of a group into its place of the ring, once both groups have read what was there."""
    places, passed, free = ring[0], ring[4], ring[5]
    mbarrier.wait(free.index(turn), side ^ 1)
    places.index(turn * 2 + GROUP).store(ds)
    fence_async_shared()
    mbarrier.arrive(passed.index(turn), count=1)


@gluon.jit
def _products(ring, turn, side, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr):
    """dS k of the tile before over the keys of both groups: half of the columns, [BM, D / 2]."""
    places, k_s, passed = ring[0], ring[1], ring[4]
    mbarrier.wait(passed.index(turn ^ 1), side ^ 1 ^ turn)
    acc = gl.zeros([BM, D // 2], gl.float32, products(BM // 16, D // 2))
    for g in gl.static_range(2):
        k = k_s.index(g).reshape([BN, D]).slice(GROUP * (D // 2), D // 2, 1)
        left = places.index((turn ^ 1) * 2 + g).permute((1, 0))
        acc = warpgroup_mma(left, k, acc, use_acc=g > 0, is_async=True)
    return acc


@gluon.jit
def _add(ring, dq, turn, row, D: gl.constexpr, GROUP: gl.constexpr):
    """Finished products of the tile before to memory, from `row` on."""
    sum_s, sums_d, free = ring[2], ring[3], ring[5]
    mbarrier.arrive(free.index(turn ^ 1), count=1)
    tma.store_wait(0)
    gl.thread_barrier()
    sum_s.index(GROUP).store(dq)
    fence_async_shared()
    async_add(sums_d, [row, GROUP * (D // 2)], sum_s.index(GROUP))


@gluon.jit
def _list(lists, block, b, h, KIND: gl.constexpr, SUBS: gl.constexpr):
    """Number of steps of a key block, their query blocks if full (0), their tiles of queries and codes if partial."""
    owner, sb, sh, div, blocks, whole, whole_count, whole_index, begin, count, index, codes = lists
    if KIND == 0:
        begin, count, index = whole, whole_count, whole_index
    place = gl.load(owner + b * sb + (h // div) * sh).to(gl.int64) * blocks + block
    start = gl.load(begin + place)
    many = gl.load(count + place)
    if KIND == 0:
        many *= SUBS
    return many, index + start, codes + start


@gluon.jit
def _row(index, t, KIND: gl.constexpr, SUBS: gl.constexpr, BM: gl.constexpr):
    """First query of a step; a full entry has SUBS of them."""
    if KIND == 0:
        return (gl.load(index + t // SUBS) * SUBS + t % SUBS) * BM
    else:
        return gl.load(index + t) * BM


@gluon.jit
def _bring(
    q_d, do_d, k_d, v_d, end_d, delta_d, shared, bars, lists, at, heads, room,
    BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s, end_s, delta_s = shared
    ready, full, empty = bars
    b, head, first, count, block = at
    mbarrier.expect(ready, 2 * GROUPS * BN * D * 2)
    for g in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(k_d, [b, head, (block * GROUPS + g) * BN, 0], ready, k_s.index(g))
        tma.async_copy_global_to_shared(v_d, [b, head, (block * GROUPS + g) * BN, 0], ready, v_s.index(g))
    stage = 0
    phase = 0
    for h in range(first, first + count):
        member = (b * heads + h) * room
        for kind in gl.static_range(2):
            found = _list(lists, block, b, h, kind, BQ // BM)
            index = found[1]
            for t in range(found[0]):
                row = _row(index, t, kind, BQ // BM, BM)
                mbarrier.wait(empty.index(stage), phase ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, 2 * BM * D * 2 + 2 * BM * 4)
                tma.async_copy_global_to_shared(q_d, [b, h, row, 0], bar, q_s.index(stage))
                tma.async_copy_global_to_shared(end_d, [member + row], bar, end_s.index(stage))
                tma.async_copy_global_to_shared(do_d, [b, h, row, 0], bar, do_s.index(stage))
                tma.async_copy_global_to_shared(delta_d, [member + row], bar, delta_s.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _words(
    table, code, BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, GROUPS: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Words [BN, 4] of the keys of a group for the step of a code."""
    step = code >> 4
    SUBS: gl.constexpr = BQ // BM
    return load_words(table, step // SUBS, GROUP * BN, GROUPS * BN, BN, BM) >> (step % SUBS * (BM // 4))


@gluon.jit
def _compute(
    grad_k, grad_v, order, table, shared, ring, bars, lists, at, heads, room, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    GROUPS: gl.constexpr, DIRECT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s, end_s, delta_s = shared
    ready, full, empty = bars
    b, _, first, count, block = at
    layout: gl.constexpr = products(BN // 16, D)
    acc_k = gl.zeros([BN, D], gl.float32, layout)
    acc_v = gl.zeros([BN, D], gl.float32, layout)
    mbarrier.wait(ready, 0)
    k = k_s.index(GROUP).reshape([BN, D])
    v = v_s.index(GROUP).reshape([BN, D])
    key = (block * GROUPS + GROUP) * BN
    stage = 0
    phase = 0
    # The ring starts with a tile of zeros, whose products fall outside the sums.
    turn = 0
    side = 0
    row = 0x7FFF0000
    if WHOLE:
        nothing = gl.zeros([BN, BM], k.dtype, products(BN // 16, BM))
        _put(ring, nothing, turn, side, GROUP)
    turn = 1
    for h in range(first, first + count):
        member = (b * heads + h) * room
        for kind in gl.static_range(2):
            many, index, codes = _list(lists, block, b, h, kind, BQ // BM)
            code = 0
            after = 0
            coming = 0
            if kind == 1:  # codes are read two steps ahead, words one; a group skips steps in which it sees nothing
                code = gl.load(codes, mask=many > 0, other=0)
                after = gl.load(codes + 1, mask=many > 1, other=0)
                coming = _words(table, code, BM, BN, BQ, GROUPS, GROUP)
            for t in range(many):
                word = coming
                seen = 1
                if kind == 1:
                    seen = code >> GROUP & 1
                    code = after
                    coming = _words(table, code, BM, BN, BQ, GROUPS, GROUP)
                    after = gl.load(codes + t + 2, mask=t + 2 < many, other=0)
                mbarrier.wait(full.index(stage), phase)
                if seen != 0:
                    acc_k, acc_v = _tile(
                        acc_k, acc_v, k, v, q_s.index(stage).reshape([BM, D]), do_s.index(stage).reshape([BM, D]),
                        end_s.index(stage), delta_s.index(stage), word, ring, turn, side, row, scale,
                        BM, BN, D, kind == 1, WHOLE, GROUP,
                    )  # fmt: skip
                elif WHOLE:
                    _unseen(ring, turn, side, row, BM, BN, D, GROUP)
                mbarrier.arrive(empty.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
                if WHOLE:
                    row = member + _row(index, t, kind, BQ // BM, BM)
                    turn ^= 1
                    if turn == 0:
                        side ^= 1
    if WHOLE:
        dq = warpgroup_mma_wait(0, deps=[_products(ring, turn, side, BM, BN, D, GROUP)])
        _add(ring, dq, turn, row, D, GROUP)
        tma.store_wait(0)
    acc_k *= factor
    store(grad_k, order, acc_k, key, b, first, BN, D, DIRECT)
    store(grad_v, order, acc_v, key, b, first, BN, D, DIRECT)


@gluon.jit
def backward_kv_kernel(
    q_d, do_d, k_d, v_d, end_d, delta_d, sums_d, grad_k, grad_v, order, lists, table,
    units, count, split, heads, room, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    GROUPS: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    """grad_k, grad_v: (pointer, rows, columns) of [B, units, rows, columns], by token if DIRECT, else by slot.

    q_d, do_d, k_d, v_d: descriptors of tensors in slot order; end_d, delta_d: of [B * Hq * room]; sums_d (if WHOLE): of
    [B * Hq * room, D] in float32. lists: (owner, its strides of samples and heads, query heads a plan head, key blocks,
    begin, count, index of full entries as `Turned` has them and begin, count, index, code of partial steps as `steps`
    does). table: words by key. units, count, split: see `Units`. GROUPS warp groups have BN keys each. One program a
    key block and unit.
    """
    pid = gl.program_id(0)
    blocks = lists[4]
    block = pid % blocks
    member = pid // blocks
    b = member // units
    unit = member % units
    dtype: gl.constexpr = q_d.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], q_d.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], do_d.layout)
    k_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, BN, D], k_d.layout)
    v_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, BN, D], v_d.layout)
    end_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], end_d.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], delta_d.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    passed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(passed.index(i), count=GROUPS)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    bars = (ready, full, empty)
    at = (b, unit // split, unit * count, count, block)
    to_k = (grad_k[0] + member.to(gl.int64) * grad_k[1] * grad_k[2], grad_k[1], grad_k[2])
    to_v = (grad_v[0] + member.to(gl.int64) * grad_v[1] * grad_v[2], grad_v[1], grad_v[2])
    ds_s = q_s
    sum_s = q_s
    if WHOLE:
        gl.static_assert(GROUPS == 2)
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], dtype)
        ds_s = gl.allocate_shared_memory(dtype, [2 * GROUPS, BN, BM], layout)
        sum_s = gl.allocate_shared_memory(gl.float32, [GROUPS, BM, D // 2], sums_d.layout)
    shared = (q_s, do_s, k_s, v_s, end_s, delta_s)
    ring = (ds_s, k_s, sum_s, sums_d, passed, free)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_compute, (to_k, to_v, order, table, shared, ring, bars, lists, at, heads, room, scale, factor,
                            BM, BN, BQ, D, STAGES, WHOLE, GROUPS, DIRECT, 0)),
                (_bring, (q_d, do_d, k_d, v_d, end_d, delta_d, shared, bars, lists, at, heads, room,
                          BM, BN, BQ, D, STAGES, GROUPS)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (to_k, to_v, order, table, shared, ring, bars, lists, at, heads, room, scale, factor,
                            BM, BN, BQ, D, STAGES, WHOLE, GROUPS, DIRECT, 0)),
                (_compute, (to_k, to_v, order, table, shared, ring, bars, lists, at, heads, room, scale, factor,
                            BM, BN, BQ, D, STAGES, WHOLE, GROUPS, DIRECT, 1)),
                (_bring, (q_d, do_d, k_d, v_d, end_d, delta_d, shared, bars, lists, at, heads, room,
                          BM, BN, BQ, D, STAGES, GROUPS)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
