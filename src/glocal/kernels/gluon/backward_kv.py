"""Gradients of keys and values on Hopper: one key block and the query blocks that list it, over all its query heads.

One warp brings queries and gradients of the output through TMA. Each group of four warps computes S^T = K Q^T and
dP^T = V dO^T for 64 keys of its own, then dV += P^T dO and dK += dS^T Q with P and dS in registers. With WHOLE the same
pass makes the gradients of the queries too, five products instead of seven: two groups pass dS to one another through a
ring of two places in shared memory, each multiplies its share of the dS of one step before with all keys, and adds the
product to float32 sums in memory. The order of these additions, hence the last bits, may differ from call to call.

Where two key blocks fit (BUFFERS), a program takes one after the other, whichever is next: starting and ending one
takes as long as four steps, and so the keys of the next come meanwhile.
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

from glocal.kernels.gluon.backward_tile import add, hide, load_words, products, rounded, share, store, widened


@gluon.jit
def _tile(
    acc_k, acc_v, k, v, q, grad, end, delta, word, ring, turn, side, row, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr, WHOLE: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """acc_k, acc_v [BN, D] plus dS^T q and P^T dO of one query tile [BM, D].

    If WHOLE, dS^T of this tile goes into the ring, and the gradients of the queries of the tile before come out while
    dK is made. Products stay apart where ptxas need not wait: their results pass no loop or branch unfinished.
    """
    warps: gl.constexpr = BN // 16
    layout: gl.constexpr = products(warps, BM)
    left: gl.constexpr = gl.DotOperandLayout(0, products(warps, D), 2)
    none = gl.zeros([BN, BM], gl.float32, layout)
    s = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, grad.permute((1, 0)), none, use_acc=False, is_async=True)
    if BM <= BN:  # else registers run out
        lse = gl.expand_dims(end.load(gl.SliceLayout(0, layout)), 0)
    s = warpgroup_mma_wait(1, deps=[s])
    if BM > BN:
        lse = gl.expand_dims(end.load(gl.SliceLayout(0, layout)), 0)
    p = gl.exp2(s * scale - lse)
    if MASKED:
        p = hide(p, word, BN, BM)
    p = rounded(p, k.dtype)
    p_left = gl.convert_layout(p, left)
    acc_v = warpgroup_mma(p_left, grad, acc_v, is_async=True)
    drop = gl.expand_dims(delta.load(gl.SliceLayout(0, layout)), 0)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = rounded(widened(p) * (dp - drop), k.dtype)
    ds_left = gl.convert_layout(ds, left)
    if WHOLE:
        _after_other(ring, turn, side, GROUP)
        _put(ring, ds, turn, GROUP)
        dq = _products(ring, turn, BM, BN, D, GROUP)
    acc_k = warpgroup_mma(ds_left, q, acc_k, is_async=True)
    if WHOLE:
        acc_v, dq, _ = warpgroup_mma_wait(1, deps=[acc_v, dq, p_left])
        _add(ring, dq, turn, row, BM, BN, D, GROUP)
        acc_k, _ = warpgroup_mma_wait(0, deps=[acc_k, ds_left])
    else:
        acc_k, acc_v, _, _ = warpgroup_mma_wait(0, deps=[acc_k, acc_v, p_left, ds_left])
    return acc_k, acc_v


@gluon.jit
def _unseen(
    ring, turn, side, row, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """What is left of a step in which a group sees nothing: zeros into the ring, and the tile before comes out."""
    dtype: gl.constexpr = ring[0].dtype
    _after_other(ring, turn, side, GROUP)
    dq = _products(ring, turn, BM, BN, D, GROUP)
    _put(ring, gl.zeros([BN, BM], dtype, products(BN // 16, BM)), turn, GROUP)
    dq = warpgroup_mma_wait(0, deps=[dq])
    _add(ring, dq, turn, row, BM, BN, D, GROUP)


@gluon.jit
def _after_other(ring, turn, side, GROUP: gl.constexpr):
    """The first group waits until the second has done with the step before, the second for this step of the first.

    So the second stays half a step behind, and one multiplies while the other makes weights.
    """
    done = ring[3]
    if GROUP == 0:
        mbarrier.wait(done[1].index(turn ^ 1), side ^ 1 ^ turn)
    else:
        mbarrier.wait(done[0].index(turn), side)


@gluon.jit
def _put(ring, ds, turn, GROUP: gl.constexpr):
    """dS^T of the keys of a group into its place of the ring."""
    ring[0].index(turn * 2 + GROUP).store(ds)
    fence_async_shared()


@gluon.jit
def _products(ring, turn, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr):
    """dS k of the tile before over the keys of both groups: the share of a group, rows or columns of [BM, D]."""
    places, k_s = ring[0], ring[1]
    ROWS: gl.constexpr = share(BM, BN, D)[0]
    COLUMNS: gl.constexpr = share(BM, BN, D)[1]
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, products(ROWS // 16, COLUMNS))
    for g in gl.static_range(2):
        k = k_s.index(ring[4] + g).reshape([BN, D])
        left = places.index((turn ^ 1) * 2 + g)
        if ROWS < BM:
            left = left.slice(GROUP * ROWS, ROWS, 1)
        else:
            k = k.slice(GROUP * COLUMNS, COLUMNS, 1)
        acc = warpgroup_mma(left.permute((1, 0)), k, acc, use_acc=g > 0, is_async=True)
    return acc


@gluon.jit
def _add(ring, dq, turn, row, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr):
    """Finished products of the tile before to memory, from `row` on; the other group may go on."""
    mbarrier.arrive(ring[3][GROUP].index(turn), count=1)
    if share(BM, BN, D)[0] < BM:
        add(ring[2], row + GROUP * (BM // 2), 0, dq, D)
    else:
        add(ring[2], row, GROUP * (D // 2), dq, D)


@gluon.jit
def _piece(n, work):
    """Where piece n of the work lies: sample, key head, first query head, how many, key block, what of its lists."""
    pieces, blocks, units, split, count = work[0], work[1], work[2], work[3], work[4]
    number = n
    skip = 0
    stop = 0
    place = -1
    if pieces is not None:
        number = gl.load(pieces + n * 4)
        skip = gl.load(pieces + n * 4 + 1)
        stop = gl.load(pieces + n * 4 + 2)
        place = gl.load(pieces + n * 4 + 3)
    member = number // blocks
    unit = member % units
    return member // units, unit // split, unit * count, count, number % blocks, skip, stop, place, member


@gluon.jit
def _tell(numbers, buffer, n):
    """The piece whose keys come into a buffer, -1 after the last, by the one warp that brings them."""
    kind: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(buffer).store(gl.full([1], n, gl.int32, kind))


@gluon.jit
def _told(numbers, buffer):
    """What `_tell` said, for four warps."""
    kind: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(numbers.index(buffer).load(kind), 0)


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
    given, BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, BUFFERS: gl.constexpr, BY_TOKEN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    bars, work = given[4], given[7]
    ready, used = bars[0], bars[1]
    numbers, counter, total = work[5], work[6], work[7]
    n = gl.program_id(0)
    buffer = 0
    side = 0
    stage = 0
    phase = 0
    if BUFFERS == 1:
        _bring_piece(given, n, buffer, stage, phase, BM, BN, BQ, D, STAGES, GROUPS, BY_TOKEN, CUT)
    else:
        while n < total:
            mbarrier.wait(used.index(buffer), side ^ 1)
            _tell(numbers, buffer, n)
            after = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
            stage, phase = _bring_piece(given, n, buffer, stage, phase, BM, BN, BQ, D, STAGES, GROUPS, BY_TOKEN, CUT)
            n = after
            buffer ^= 1
            if buffer == 0:
                side ^= 1
        mbarrier.wait(used.index(buffer), side ^ 1)
        _tell(numbers, buffer, -1)
        mbarrier.arrive(ready.index(buffer), count=1)


@gluon.jit
def _bring_piece(
    given, n, buffer, stage, phase, BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, BY_TOKEN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Keys and queries of a piece; the next stage and its phase."""
    tiles, cleaned, order, shared, bars, lists, where, work = given
    heads, room = where
    q_d, do_d, k_d, v_d, end_d, delta_d, clean_q_d, clean_do_d = tiles
    q_s, do_s, k_s, v_s, end_s, delta_s = shared
    ready, full, empty = bars[0].index(buffer), bars[2], bars[3]
    at = _piece(n, work)
    b, head, first, count, block = at[0], at[1], at[2], at[3], at[4]
    mbarrier.expect(ready, 2 * GROUPS * BN * D * 2)
    for g in gl.static_range(GROUPS):
        row = (block * GROUPS + g) * BN
        if BY_TOKEN:
            row = gl.load(order[0] + b * order[1] + (first // order[3]) * order[2] + row)
            row = gl.where(row < 0, 0x7FFF0000, row)  # outside
        tma.async_copy_global_to_shared(k_d, [b, head, row, 0], ready, k_s.index(buffer * GROUPS + g))
        tma.async_copy_global_to_shared(v_d, [b, head, row, 0], ready, v_s.index(buffer * GROUPS + g))
    ill = 0
    if cleaned is not None:
        ill = gl.load(cleaned)
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
    return stage, phase


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
    given, BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    WHOLE: gl.constexpr, GROUPS: gl.constexpr, BUFFERS: gl.constexpr, DIRECT: gl.constexpr, CLEAN: gl.constexpr,
    CUT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    bars, numbers = given[7], given[10][5]
    ready, used = bars[0], bars[1]
    stage = 0
    phase = 0
    turn = 0
    side = 0
    buffer = 0
    lap = 0
    mbarrier.wait(ready.index(0), 0)
    if BUFFERS == 1:
        _compute_piece(
            given, gl.program_id(0), buffer, stage, phase, turn, side,
            BM, BN, BQ, D, STAGES, WHOLE, GROUPS, DIRECT, CLEAN, CUT, GROUP,
        )  # fmt: skip
    else:
        n = _told(numbers, 0)
        while n >= 0:
            stage, phase, turn, side = _compute_piece(
                given, n, buffer, stage, phase, turn, side,
                BM, BN, BQ, D, STAGES, WHOLE, GROUPS, DIRECT, CLEAN, CUT, GROUP,
            )  # fmt: skip
            mbarrier.arrive(used.index(buffer), count=1)
            buffer ^= 1
            if buffer == 0:
                lap ^= 1
            mbarrier.wait(ready.index(buffer), lap)
            n = _told(numbers, buffer)


@gluon.jit
def _compute_piece(
    given, n, buffer, stage, phase, turn, side, BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr, GROUPS: gl.constexpr, DIRECT: gl.constexpr,
    CLEAN: gl.constexpr, CUT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Gradients of a piece whose keys are there; where the stages and the ring stand after it."""
    grad_k, grad_v, portion_sums, order, table, shared, ring, bars, lists, where, work, scale, factor = given
    q_s, do_s, k_s, v_s, end_s, delta_s = shared
    heads, room, spare = where
    full, empty = bars[2], bars[3]
    ring = (ring[0], k_s, ring[1], ring[2], buffer * GROUPS)
    at = _piece(n, work)
    b, first, count, block = at[0], at[2], at[3], at[4]
    owner = at[8].to(gl.int64)
    grad_k = (grad_k[0] + owner * grad_k[1] * grad_k[2], grad_k[1], grad_k[2])
    grad_v = (grad_v[0] + owner * grad_v[1] * grad_v[2], grad_v[1], grad_v[2])
    layout: gl.constexpr = products(BN // 16, D)
    acc_k = gl.zeros([BN, D], gl.float32, layout)
    acc_v = gl.zeros([BN, D], gl.float32, layout)
    k = k_s.index(buffer * GROUPS + GROUP).reshape([BN, D])
    v = v_s.index(buffer * GROUPS + GROUP).reshape([BN, D])
    if CLEAN:  # the other group waits for what comes into the ring next
        _clean(k, v, BN, D)
    key = (block * GROUPS + GROUP) * BN
    # The ring starts with a tile of zeros, whose products go to rows of the sums that nobody reads.
    row = spare
    if WHOLE:
        _after_other(ring, turn, side, GROUP)
        _put(ring, gl.zeros([BN, BM], k.dtype, products(BN // 16, BM)), turn, GROUP)
        mbarrier.arrive(ring[3][GROUP].index(turn), count=1)
        turn ^= 1
        if turn == 0:
            side ^= 1
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
                here = row
                if WHOLE:  # read long before it is used
                    here = member + _row(index, t, kind, BQ // BM, BM)
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
                if WHOLE:
                    row = here
                    turn ^= 1
                    if turn == 0:
                        side ^= 1
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
    if WHOLE:
        mbarrier.wait(ring[3][1 - GROUP].index(turn ^ 1), side ^ 1 ^ turn)  # the last step of the other
        dq = warpgroup_mma_wait(0, deps=[_products(ring, turn, BM, BN, D, GROUP)])
        _add(ring, dq, turn, row, BM, BN, D, GROUP)
        turn ^= 1
        if turn == 0:
            side ^= 1
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
    return stage, phase, turn, side


@gluon.jit
def backward_kv_kernel(
    q_d, do_d, k_d, v_d, end_d, delta_d, cleaned, clean_q_d, clean_do_d, sums, grad_k, grad_v,
    portion_sums, order, lists, table, pieces, counter, total, units, count, split, heads, room, spare, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    GROUPS: gl.constexpr, BUFFERS: gl.constexpr, DIRECT: gl.constexpr, CLEAN: gl.constexpr, BY_TOKEN: gl.constexpr,
):  # fmt: skip
    """grad_k, grad_v: (pointer, rows, columns) of [B, units, rows, columns], by token if DIRECT, else by slot.

    q_d, do_d, k_d, v_d: descriptors of tensors in slot order; k_d and v_d by token if BY_TOKEN, whose rows of BN slots
    are neighbours. CLEAN: bad rows of k and v are zeroed here. cleaned: int32 [1], whether clean_q_d and clean_do_d are
    to be read instead of q_d and do_d; None: they are not. end_d, delta_d: of [B * Hq * room]. sums (if WHOLE): float32
    [B * Hq * room + BM, D] as `add` has them, the last BM rows, from `spare` on, for nobody. lists: (owner, its strides
    of samples and heads, query heads a plan head, key blocks, begin, count, index of full entries as `Turned` has them
    and begin, count, index, code of partial steps as `steps` does). table: words by key. units, count, split: see
    `Units`. GROUPS warp groups have BN keys each. The work is `total` pieces, one a key block and unit, or as
    `programs` of `Portions` say, None or int32 [total, 4]; sums of portions go to `portion_sums` [places, 2, GROUPS *
    BN, D] in float32. A program takes one piece; if BUFFERS is 2, one after the other by `counter`, int32 [1], 0.
    """
    CUT: gl.constexpr = pieces is not None
    dtype: gl.constexpr = q_d.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], q_d.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], do_d.layout)
    k_s = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS, 1, 1, BN, D], k_d.layout)
    v_s = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS, 1, 1, BN, D], v_d.layout)
    end_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], end_d.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], delta_d.layout)
    numbers = gl.allocate_shared_memory(gl.int32, [BUFFERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done0 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done1 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(used.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(done0.index(i), count=1)
        mbarrier.init(done1.index(i), count=1)
    fence_async_shared()
    bars = (ready, used, full, empty)
    work = (pieces, lists[4], units, split, count, numbers, counter, total)
    ds_s = q_s
    if WHOLE:
        gl.static_assert(GROUPS == 2)
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], dtype)
        ds_s = gl.allocate_shared_memory(dtype, [2 * GROUPS, BN, BM], layout)
    shared = (q_s, do_s, k_s, v_s, end_s, delta_s)
    ring = (ds_s, sums, (done0, done1))
    tiles = (q_d, do_d, k_d, v_d, end_d, delta_d, clean_q_d, clean_do_d)
    bring = (tiles, cleaned, order, shared, bars, lists, (heads, room), work)
    given = (
        grad_k, grad_v, portion_sums, order, table, shared, ring, bars, lists, (heads, room, spare), work, scale, factor
    )  # fmt: skip
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_compute, (given, BM, BN, BQ, D, STAGES, WHOLE, GROUPS, BUFFERS, DIRECT, CLEAN, CUT, 0)),
                (_bring, (bring, BM, BN, BQ, D, STAGES, GROUPS, BUFFERS, BY_TOKEN, CUT)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (given, BM, BN, BQ, D, STAGES, WHOLE, GROUPS, BUFFERS, DIRECT, CLEAN, CUT, 0)),
                (_compute, (given, BM, BN, BQ, D, STAGES, WHOLE, GROUPS, BUFFERS, DIRECT, CLEAN, CUT, 1)),
                (_bring, (bring, BM, BN, BQ, D, STAGES, GROUPS, BUFFERS, BY_TOKEN, CUT)),
            ],
            [4, 1],
            [240, 24],
        )
