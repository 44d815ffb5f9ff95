"""Gradient of the queries on Hopper: one query block, its key blocks once more, P made again from the LSE.

One warp brings keys and values through TMA, eight compute S = Q K^T and dP = dO V^T, then dQ += dS K with dS in
registers. Full blocks carry no masks; partial ones read one word a lane. Sums run in a fixed order.
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

from glocal.kernels.gluon.backward_tile import hide, load_words, products, store


@gluon.jit
def _block(
    acc, q, grad, k, v, end, delta, word, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """acc [BM, D] plus dS k of one key tile."""
    layout: gl.constexpr = products(BM // 16, BN)
    none = gl.zeros([BM, BN], gl.float32, layout)
    s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
    dp = warpgroup_mma(grad, v.permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale - gl.expand_dims(end, 1))
    if MASKED:
        p = hide(p, word, BM, BN)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * (dp - gl.expand_dims(delta, 1))
    left = gl.convert_layout(ds.to(k.dtype), gl.DotOperandLayout(0, products(BM // 16, D), 2))
    acc = warpgroup_mma(left, k, acc, is_async=True)
    acc, _ = warpgroup_mma_wait(0, deps=[acc, left])
    return acc


@gluon.jit
def _list(lists, at, b, h, KIND: gl.constexpr):
    """Number of entries, their key blocks and masks, for full (0) or partial (1) entries of a query block."""
    owner, sb, sh, div, blocks, whole, whole_index, whole_most, count, index, most, masks = lists
    place = gl.load(owner + b * sb + (h // div) * sh).to(gl.int64) * blocks + at
    if KIND == 0:
        count, index, most = whole, whole_index, whole_most
    return gl.load(count + place), index + place * most, masks + place * most


@gluon.jit
def _bring(
    q_d, do_d, k_d, v_d, shared, bars, lists, at,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s = shared
    ready, full, empty = bars
    b, h, head, block = at
    mbarrier.expect(ready, 2 * GROUPS * BM * D * 2)
    for g in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_d, [b, h, (block * GROUPS + g) * BM, 0], ready, q_s.index(g))
        tma.async_copy_global_to_shared(do_d, [b, h, (block * GROUPS + g) * BM, 0], ready, do_s.index(g))
    stage = 0
    phase = 0
    for kind in gl.static_range(2):
        found = _list(lists, block, b, h, kind)
        index = found[1]
        for t in range(found[0] * (BK // BN)):
            row = gl.load(index + t // (BK // BN)) * BK + t % (BK // BN) * BN
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), 2 * BN * D * 2)
            tma.async_copy_global_to_shared(k_d, [b, head, row, 0], full.index(stage), k_s.index(stage))
            tma.async_copy_global_to_shared(v_d, [b, head, row, 0], full.index(stage), v_s.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _compute(
    end, delta, grad_q, order, table, shared, bars, lists, at, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    DIRECT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s = shared
    ready, full, empty = bars
    b, h, _, block = at
    q = q_s.index(GROUP).reshape([BM, D])
    grad = do_s.index(GROUP).reshape([BM, D])
    first = (block * GROUPS + GROUP) * BM
    layout: gl.constexpr = products(BM // 16, D)
    acc = gl.zeros([BM, D], gl.float32, layout)
    row = first + gl.arange(0, BM, layout=gl.SliceLayout(1, products(BM // 16, BN)))
    lse = gl.load(end + row)
    drop = gl.load(delta + row)
    mbarrier.wait(ready, 0)
    stage = 0
    phase = 0
    for kind in gl.static_range(2):
        found = _list(lists, block, b, h, kind)
        count, masks = found[0], found[2]
        coming = 0
        if kind == 1:  # words are read one step ahead: two loads, one after the other
            coming = load_words(table, gl.load(masks, mask=count > 0, other=0), GROUP * BM, GROUPS * BM, BM, BN)
        for t in range(count * (BK // BN)):
            word = coming
            if kind == 1:
                word = word >> (t % (BK // BN) * (BN // 4))
                after = (t + 1) // (BK // BN)
                mask = gl.load(masks + after, mask=after < count, other=0)
                coming = load_words(table, mask, GROUP * BM, GROUPS * BM, BM, BN)
            mbarrier.wait(full.index(stage), phase)
            k = k_s.index(stage).reshape([BN, D])
            v = v_s.index(stage).reshape([BN, D])
            acc = _block(acc, q, grad, k, v, lse, drop, word, scale, BM, BN, D, kind == 1)
            mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
    store(grad_q, order, acc * factor, first, b, h, BM, D, DIRECT)


@gluon.jit
def backward_q_kernel(
    q_d, do_d, k_d, v_d, end, delta, grad_q, order, lists, table, heads, group, room, scale, factor,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    DIRECT: gl.constexpr,
):  # fmt: skip
    """grad_q: (pointer, rows, columns) of [B, Hq, rows, columns], by token if DIRECT, else by slot.

    q_d, do_d, k_d, v_d: descriptors of tensors in slot order. end: LSE in bits (+inf: sees nothing), delta; both
    [B, Hq, room]. lists: (owner, its strides of samples and heads, query heads a plan head, query blocks, count, index,
    width of full and count, index, width, mask of partial entries). table: words by query. scale is that of the logits
    in bits, factor that of the result. GROUPS warp groups have BM queries each. One program a query block.
    """
    pid = gl.program_id(0)
    blocks = lists[4]
    block = pid % blocks
    member = pid // blocks
    b = member // heads
    h = member % heads
    dtype: gl.constexpr = q_d.dtype
    q_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, BM, D], q_d.layout)
    do_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, BM, D], do_d.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_d.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_d.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    shared = (q_s, do_s, k_s, v_s)
    bars = (ready, full, empty)
    at = (b, h, h // group, block)
    first = member.to(gl.int64) * room
    to = (grad_q[0] + member.to(gl.int64) * grad_q[1] * grad_q[2], grad_q[1], grad_q[2])
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_compute, (end + first, delta + first, to, order, table, shared, bars, lists, at, scale, factor,
                            BM, BN, BK, D, STAGES, GROUPS, DIRECT, 0)),
                (_bring, (q_d, do_d, k_d, v_d, shared, bars, lists, at, BM, BN, BK, D, STAGES, GROUPS)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (end + first, delta + first, to, order, table, shared, bars, lists, at, scale, factor,
                            BM, BN, BK, D, STAGES, GROUPS, DIRECT, 0)),
                (_compute, (end + first, delta + first, to, order, table, shared, bars, lists, at, scale, factor,
                            BM, BN, BK, D, STAGES, GROUPS, DIRECT, 1)),
                (_bring, (q_d, do_d, k_d, v_d, shared, bars, lists, at, BM, BN, BK, D, STAGES, GROUPS)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
