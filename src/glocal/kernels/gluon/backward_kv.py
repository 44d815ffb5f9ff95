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
def _logits(k, q, BM: gl.constexpr, BN: gl.constexpr):
    """Start k q^T, [BN, BM]."""
    none = gl.zeros([BN, BM], gl.float32, products(BN // 16, BM))
    return warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _tile(
    acc_k, acc_v, s, k, v, q, grad, end, delta, word, ring, turn, side, row, scale, coming,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr, WHOLE: gl.constexpr,
    AHEAD: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """acc_k, acc_v [BN, D] plus dS^T q and P^T dO of one query tile [BM, D].

    If WHOLE, dS^T of this tile goes into the ring and the gradients of the queries of the tile before come out. Where
    registers allow it, their products fill the time in which dS is made. If AHEAD, s holds the logits, and those of the
    step that comes are made meanwhile and returned. ptxas keeps products apart by waits of its own where their results
    pass a loop or a branch unfinished, or where registers run out.
    """
    EARLY: gl.constexpr = D <= 64
    warps: gl.constexpr = BN // 16
    layout: gl.constexpr = products(warps, BM)
    left: gl.constexpr = gl.DotOperandLayout(0, products(warps, D), 2)
    none = gl.zeros([BN, BM], gl.float32, layout)
    if not AHEAD:
        s = _logits(k, q, BM, BN)
    dp = warpgroup_mma(v, grad.permute((1, 0)), none, use_acc=False, is_async=True)
    if AHEAD and EARLY:
        after = _logits_after(k, coming, BM, BN, D)
    lse = gl.expand_dims(end.load(gl.SliceLayout(0, layout)), 0)
    if not AHEAD:
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
        dp = warpgroup_mma_wait(4 if AHEAD else 3, deps=[dp])
    else:
        dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p.to(gl.float32) * (dp - drop)
    ds = ds.to(k.dtype)
    ds_left = gl.convert_layout(ds, left)
    acc_k = warpgroup_mma(ds_left, q, acc_k, is_async=True)
    if WHOLE:
        _put(ring, ds, turn, side, GROUP)
        if EARLY:
            if AHEAD:
                s, acc_v, dq, _ = warpgroup_mma_wait(1, deps=[after, acc_v, dq, p_left])
            else:
                acc_v, dq, _ = warpgroup_mma_wait(1, deps=[acc_v, dq, p_left])
            _add(ring, dq, turn, row, D, GROUP)
            acc_k, _ = warpgroup_mma_wait(0, deps=[acc_k, ds_left])
        else:
            dq = _products(ring, turn, side, BM, BN, D, GROUP)
            if AHEAD:
                after = _logits_after(k, coming, BM, BN, D)
                acc_k, acc_v, dq, _, _ = warpgroup_mma_wait(1, deps=[acc_k, acc_v, dq, p_left, ds_left])
            else:
                acc_k, acc_v, dq, _, _ = warpgroup_mma_wait(0, deps=[acc_k, acc_v, dq, p_left, ds_left])
            _add(ring, dq, turn, row, D, GROUP)
            if AHEAD:
                s = warpgroup_mma_wait(0, deps=[after])
    else:
        acc_k, acc_v, _, _ = warpgroup_mma_wait(0, deps=[acc_k, acc_v, p_left, ds_left])
    return acc_k, acc_v, s


@gluon.jit
def _logits_after(k, coming, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr):
    """Start k q^T of the step that comes, if there is one; else of a tile that is not needed."""
    tiles, full, stage, phase, left = coming
    if left > 0:
        mbarrier.wait(full.index(stage), phase)
    return _logits(k, tiles.index(stage).reshape([BM, D]), BM, BN)


@gluon.jit
def _unseen(
    s, k, ring, turn, side, row, coming, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, AHEAD: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """What is left of a step in which a group sees nothing: zeros into the ring, and the tile before comes out."""
    dtype: gl.constexpr = ring[0].dtype
    dq = _products(ring, turn, side, BM, BN, D, GROUP)
    if AHEAD:
        s = _logits_after(k, coming, BM, BN, D)
    _put(ring, gl.zeros([BN, BM], dtype, products(BN // 16, BM)), turn, side, GROUP)
    if AHEAD:
        dq, s = warpgroup_mma_wait(0, deps=[dq, s])
    else:
        dq = warpgroup_mma_wait(0, deps=[dq])
    _add(ring, dq, turn, row, D, GROUP)
    return s


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
def _list(lists, at, h, KIND: gl.constexpr, SUBS: gl.constexpr, CUT: gl.constexpr):
    """First step of a program and the one after its last; query blocks of full steps (0), tiles of queries and codes of
    partial ones. If CUT, a program has a portion of them, counted from the end of the full steps.
    """
    owner, sb, sh, div, blocks, whole, whole_count, whole_index, begin, count, index, codes = lists
    b, block, skip, stop = at[0], at[4], at[5], at[6]
    place = gl.load(owner + b * sb + (h // div) * sh).to(gl.int64) * blocks + block
    beyond = 0
    if KIND == 0:
        start = gl.load(whole + place)
        many = gl.load(whole_count + place) * SUBS
        index = whole_index
    else:
        start = gl.load(begin + place)
        many = gl.load(count + place)
        if CUT:
            beyond = gl.load(whole_count + place) * SUBS
    first = 0
    last = many
    if CUT:
        first = gl.minimum(gl.maximum(many + beyond - stop, 0), many)
        last = gl.minimum(gl.maximum(many + beyond - skip, 0), many)
    return first, last, index + start, codes + start


@gluon.jit
def _row(index, t, KIND: gl.constexpr, SUBS: gl.constexpr, BM: gl.constexpr):
    """First query of a step; a full entry has SUBS of them."""
    if KIND == 0:
        return (gl.load(index + t // SUBS) * SUBS + t % SUBS) * BM
    else:
        return gl.load(index + t) * BM


@gluon.jit
def _bring(
    q_d, do_d, k_d, v_d, end_d, delta_d, cleaned, clean_q_d, clean_do_d, order, shared, bars, lists, at, heads, room,
    BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    BY_TOKEN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s, end_s, delta_s = shared
    ready, full, empty = bars
    b, head, first, count, block = at[0], at[1], at[2], at[3], at[4]
    mbarrier.expect(ready, 2 * GROUPS * BN * D * 2)
    for g in gl.static_range(GROUPS):
        row = (block * GROUPS + g) * BN
        if BY_TOKEN:
            row = gl.load(order[0] + b * order[1] + (first // order[3]) * order[2] + row)
            row = gl.where(row < 0, 0x7FFF0000, row)  # outside
        tma.async_copy_global_to_shared(k_d, [b, head, row, 0], ready, k_s.index(g))
        tma.async_copy_global_to_shared(v_d, [b, head, row, 0], ready, v_s.index(g))
    ill = 0
    if cleaned is not None:
        ill = gl.load(cleaned)
    stage = 0
    phase = 0
    for h in range(first, first + count):
        member = (b * heads + h) * room
        for kind in gl.static_range(2):
            begin, end, index, _ = _list(lists, at, h, kind, BQ // BM, CUT)
            for t in range(begin, end):
                row = _row(index, t, kind, BQ // BM, BM)
                mbarrier.wait(empty.index(stage), phase ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, 2 * BM * D * 2 + 2 * BM * 4)
                if cleaned is None or ill == 0:
                    tma.async_copy_global_to_shared(q_d, [b, h, row, 0], bar, q_s.index(stage))
                    tma.async_copy_global_to_shared(do_d, [b, h, row, 0], bar, do_s.index(stage))
                else:
                    tma.async_copy_global_to_shared(clean_q_d, [b, h, row, 0], bar, q_s.index(stage))
                    tma.async_copy_global_to_shared(clean_do_d, [b, h, row, 0], bar, do_s.index(stage))
                tma.async_copy_global_to_shared(end_d, [member + row], bar, end_s.index(stage))
                tma.async_copy_global_to_shared(delta_d, [member + row], bar, delta_s.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _clean(k, v, BN: gl.constexpr, D: gl.constexpr):
    """Zeros for the key and the value of rows of shared tiles [BN, D] that hold an entry which is not finite."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    keys, values = k.load(layout), v.load(layout)
    ill = gl.max(gl.where(gl.abs(values.to(gl.float32)) < float("inf"), 0, 1), 1)
    worse = gl.maximum(ill, gl.max(gl.where(gl.abs(keys.to(gl.float32)) < float("inf"), 0, 1), 1))
    if gl.max(worse, 0) > 0:
        k.store(gl.where(gl.expand_dims(worse, 1) > 0, 0.0, keys.to(gl.float32)).to(keys.dtype))
        v.store(gl.where(gl.expand_dims(ill, 1) > 0, 0.0, values.to(gl.float32)).to(values.dtype))
        fence_async_shared()
    gl.thread_barrier()


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
    grad_k, grad_v, portion_sums, order, table, shared, ring, bars, lists, at, heads, room, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    GROUPS: gl.constexpr, DIRECT: gl.constexpr, AHEAD: gl.constexpr, CLEAN: gl.constexpr,
    CUT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s, end_s, delta_s = shared
    ready, full, empty = bars
    b, first, count, block = at[0], at[2], at[3], at[4]
    layout: gl.constexpr = products(BN // 16, D)
    acc_k = gl.zeros([BN, D], gl.float32, layout)
    acc_v = gl.zeros([BN, D], gl.float32, layout)
    mbarrier.wait(ready, 0)
    k = k_s.index(GROUP).reshape([BN, D])
    v = v_s.index(GROUP).reshape([BN, D])
    if CLEAN:  # the other group waits for what comes into the ring next
        _clean(k, v, BN, D)
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
    left = 0
    s = gl.zeros([BN, BM], gl.float32, products(BN // 16, BM))
    if AHEAD:  # logits of a step, whichever list it is of, are made during the one before
        for h in range(first, first + count):
            for kind in gl.static_range(2):
                begin, end, _, _ = _list(lists, at, h, kind, BQ // BM, CUT)
                left += end - begin
        s = warpgroup_mma_wait(0, deps=[_logits_after(k, (q_s, full, 0, 0, left), BM, BN, D)])
    for h in range(first, first + count):
        member = (b * heads + h) * room
        for kind in gl.static_range(2):
            begin, end, index, codes = _list(lists, at, h, kind, BQ // BM, CUT)
            code = 0
            after = 0
            coming = 0
            if kind == 1:  # codes are read two steps ahead, words one; a group skips steps in which it sees nothing
                code = gl.load(codes + begin, mask=begin < end, other=0)
                after = gl.load(codes + begin + 1, mask=begin + 1 < end, other=0)
                coming = _words(table, code, BM, BN, BQ, GROUPS, GROUP)
            for t in range(begin, end):
                word = coming
                seen = 1
                if kind == 1:
                    seen = code >> GROUP & 1
                    code = after
                    coming = _words(table, code, BM, BN, BQ, GROUPS, GROUP)
                    after = gl.load(codes + t + 2, mask=t + 2 < end, other=0)
                left -= 1
                coming_stage = (stage + 1) % STAGES
                after_this = (q_s, full, coming_stage, phase ^ (coming_stage == 0).to(gl.int32), left)
                if not AHEAD:
                    mbarrier.wait(full.index(stage), phase)
                if seen != 0:
                    acc_k, acc_v, s = _tile(
                        acc_k, acc_v, s, k, v, q_s.index(stage).reshape([BM, D]), do_s.index(stage).reshape([BM, D]),
                        end_s.index(stage), delta_s.index(stage), word, ring, turn, side, row, scale, after_this,
                        BM, BN, D, kind == 1, WHOLE, AHEAD, GROUP,
                    )  # fmt: skip
                elif WHOLE:
                    s = _unseen(s, k, ring, turn, side, row, after_this, BM, BN, D, AHEAD, GROUP)
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
    place = at[7]
    if not CUT:
        store(grad_k, order, acc_k, key, b, first, BN, D, DIRECT)
        store(grad_v, order, acc_v, key, b, first, BN, D, DIRECT)
    elif place >= 0:
        to = portion_sums + (place.to(gl.int64) * 2 * GROUPS + GROUP) * (BN * D)
        store((to, BN, D), order, acc_k, 0, b, first, BN, D, False)
        store((to + GROUPS * BN * D, BN, D), order, acc_v, 0, b, first, BN, D, False)
    else:
        store(grad_k, order, acc_k, key, b, first, BN, D, DIRECT)
        store(grad_v, order, acc_v, key, b, first, BN, D, DIRECT)


@gluon.jit
def backward_kv_kernel(
    q_d, do_d, k_d, v_d, end_d, delta_d, cleaned, clean_q_d, clean_do_d, sums_d, grad_k, grad_v,
    portion_sums, order, lists, table, programs, units, count, split, heads, room, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    GROUPS: gl.constexpr, DIRECT: gl.constexpr, AHEAD: gl.constexpr, CLEAN: gl.constexpr,
    BY_TOKEN: gl.constexpr,
):  # fmt: skip
    """grad_k, grad_v: (pointer, rows, columns) of [B, units, rows, columns], by token if DIRECT, else by slot.

    q_d, do_d, k_d, v_d: descriptors of tensors in slot order; k_d and v_d by token if BY_TOKEN, whose rows of BN slots
    are neighbours. CLEAN: bad rows of k and v are zeroed here. cleaned: int32 [1], whether clean_q_d and clean_do_d are
    to be read instead of q_d and do_d; None: they are not. end_d, delta_d: of [B * Hq * room]; sums_d (if WHOLE): of
    [B * Hq * room, D] in float32. lists: (owner, its strides of samples and heads, query heads a plan head, key blocks,
    begin, count, index of full entries as `Turned` has them and begin, count, index, code of partial steps as `steps`
    does). table: words by key. units, count, split: see `Units`. GROUPS warp groups have BN keys each. One program a
    key block and unit, or as `programs` of `Portions` say, None or int32 [n, 4]; sums of portions go to `portion_sums`
    [places, 2, GROUPS * BN, D] in float32.
    """
    pid = gl.program_id(0)
    blocks = lists[4]
    number = pid
    skip = 0
    stop = 0
    place = -1
    CUT: gl.constexpr = programs is not None
    if CUT:
        number = gl.load(programs + pid * 4)
        skip = gl.load(programs + pid * 4 + 1)
        stop = gl.load(programs + pid * 4 + 2)
        place = gl.load(programs + pid * 4 + 3)
    block = number % blocks
    member = number // blocks
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
    at = (b, unit // split, unit * count, count, block, skip, stop, place)
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
                (_compute, (to_k, to_v, portion_sums, order, table, shared, ring, bars, lists, at, heads, room, scale,
                            factor, BM, BN, BQ, D, STAGES, WHOLE, GROUPS, DIRECT, AHEAD, CLEAN, CUT, 0)),
                (_bring, (q_d, do_d, k_d, v_d, end_d, delta_d, cleaned, clean_q_d, clean_do_d, order, shared, bars,
                          lists, at, heads, room, BM, BN, BQ, D, STAGES, GROUPS, BY_TOKEN, CUT)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (to_k, to_v, portion_sums, order, table, shared, ring, bars, lists, at, heads, room, scale,
                            factor, BM, BN, BQ, D, STAGES, WHOLE, GROUPS, DIRECT, AHEAD, CLEAN, CUT, 0)),
                (_compute, (to_k, to_v, portion_sums, order, table, shared, ring, bars, lists, at, heads, room, scale,
                            factor, BM, BN, BQ, D, STAGES, WHOLE, GROUPS, DIRECT, AHEAD, CLEAN, CUT, 1)),
                (_bring, (q_d, do_d, k_d, v_d, end_d, delta_d, cleaned, clean_q_d, clean_do_d, order, shared, bars,
                          lists, at, heads, room, BM, BN, BQ, D, STAGES, GROUPS, BY_TOKEN, CUT)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
