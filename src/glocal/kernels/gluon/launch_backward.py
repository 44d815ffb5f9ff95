"""Calls of the backward kernels on Hopper: tensors into plan order and TMA descriptors, gradients back to tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from glocal.kernels._jobs import Units
from glocal.kernels.call import Call, Grads
from glocal.kernels.gluon import masks
from glocal.kernels.gluon.backward_ends import after_kernel, portions_kernel
from glocal.kernels.gluon.backward_kv import backward_kv_kernel
from glocal.kernels.gluon.backward_q import backward_q_kernel
from glocal.kernels.gluon.backward_tile import share
from glocal.kernels.gluon.backward_tuning import GROUP, tuning_kv, tuning_q, whole
from glocal.kernels.gluon.portions import Portions, portions, processors
from glocal.kernels.gluon.reblocked import paired_keys
from glocal.kernels.gluon.steps import steps
from glocal.kernels.triton import defaults
from glocal.kernels.triton.launch import Known
from glocal.kernels.triton.launch import backward as in_triton
from glocal.kernels.triton.lists import Slots, turned
from glocal.kernels.triton.merge import fold_kernel
from glocal.kernels.triton.ordered import ordered_rows_kernel
from glocal.kernels.triton.work import Work, box_width, may_look, on_device, prepare, start, strided

_LOG2E = 1.4426950408889634
_ROWS = 0x7FFF0000  # rows that coordinates of 32 bits can count, with room for one that lies outside
_SPARE = 128  # rows of the sums for tiles that stand for none
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@dataclass(frozen=True, eq=False)
class _Inputs:
    """In slot order: q, k, v, grad of out [B, heads, room, D]; LSE in base 2 and delta [B, Hq, room].

    width: head size of the tiles, what is beyond that of a tensor reads as 0. cleaned: int32 [1], whether instead of q
    and grad their copies are to be read, which follow; None: never. by_token: k and v are in the order of tokens.
    unclean: bad rows of k and v may be there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    end: Tensor
    delta: Tensor
    width: int
    cleaned: tuple[Tensor, Tensor, Tensor] | None = None
    by_token: bool = False
    unclean: bool = False


def fits(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether these kernels take a call; the others are for Triton."""
    rows = (
        max(q.shape[0] * q.shape[1] * t.shape[-1] for t in (call.plan.q_order, call.plan.kv_order)) if call.plan else 0
    )
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and max(q.shape[3], v.shape[3]) <= 128
        and {call.q_block, call.kv_block} <= {64, 128}
        and call.softcap is None
        and not call.bias
        and call.segments is None
        and rows < _ROWS
    )


def backward(known: Known, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Grads:
    """Gradients through out and LSE; equal bits from call to call where torch asks for deterministic algorithms.

    Calls that do not fit go to the kernels in Triton.
    """
    if not fits(q, k, v, call):
        return in_triton(known, q, k, v, call)
    w = prepare(q, k, v, call)
    if 0 in (q.numel(), k.numel(), v.numel(), w.q_room, w.room):
        return Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    with on_device(q):
        equal_bits = torch.are_deterministic_algorithms_enabled()
        long = w if equal_bits else _with_long_blocks(w, k.shape[1])
        if equal_bits or not whole(long.call.kv_block):
            x = _inputs(w, q, k, v, known)
            return Grads(_grad_q(w, x, q), *_grad_kv(w, x, k, v, None))
        x = _inputs(long, q, k, v, known, tokens=w.kv_facts.identity)
        rows = w.batch * w.heads * w.q_room + _SPARE + 1  # the last counts
        sums = torch.zeros(rows, x.width, dtype=torch.float32, device=q.device)
        grad_k, grad_v = _grad_kv(long, x, k, v, sums)
        return Grads(_from_sums(w, q, sums), grad_k, grad_v)


def _with_long_blocks(w: Work, kv_heads: int) -> Work:
    """Key blocks of 64 in pairs where that pays, so that one pass makes all gradients."""
    if whole(w.call.kv_block) or not may_look(w.plan.full_index):
        return w
    plan, notes = w.noted("pairs", lambda: (paired_keys(w.plan, w.call.kv_block, kv_heads, w.kv_facts), {}))
    if plan is None:
        return w
    facts = w.kv_facts if plan.kv_order is w.plan.kv_order else replace(w.kv_facts, identity=False)
    call = replace(w.call, plan=plan, kv_block=2 * w.call.kv_block)
    return replace(w, plan=plan, call=call, kv_facts=facts, notes=notes)


def _inputs(w: Work, q: Tensor, k: Tensor, v: Tensor, known: Known, *, tokens: bool | None = None) -> _Inputs:
    """Copies in slot order, bad rows cleaned, unless tokens lie so already and every pair of a block counts.

    tokens: whether blocks of keys are runs of tokens, for the kernel that makes all gradients: it cleans keys itself,
    and reads copies of queries only where the device finds a bad row.
    """
    (b, h, n, d), room, grad = q.shape, w.q_room, known.grad_out
    lie = w.q_facts.identity and _readable(q) and _readable(grad)
    plain = lie and w.plain
    to_q, to_grad = (q, grad) if plain else (t.new_empty(b, h, room, box_width(t)) for t in (q, grad))
    end, delta = (torch.empty(b, h, room, dtype=torch.float32, device=q.device) for _ in range(2))
    found = torch.zeros(1, dtype=torch.int32, device=q.device) if lie and not plain and tokens is not None else None

    def rows(size: int, copy: bool, found: Tensor | None, when: Tensor | None) -> None:
        tiles = -(-room // size)
        start(
            ordered_rows_kernel, b * h * tiles,
            strided(q), strided(grad), strided(known.out), known.lse.contiguous(), known.grad_lse.contiguous(),
            to_q, to_grad, end, delta, w.row(w.plan.q_order), h, n, room, tiles, found, when,
            D=d, DV=grad.shape[3], PD=to_q.shape[3], PDV=to_grad.shape[3], WD=w.sizes["WD"], WDV=w.sizes["WDV"],
            BM=size, COPY=copy,
        )  # fmt: skip

    rows(defaults.ROWS, not plain and found is None, found, None)
    if found is not None:
        rows(4 * defaults.ROWS, True, None, found)
    width = 64 if max(d, v.shape[3]) <= 64 else 128
    lie = _readable(k) and _readable(v)
    if lie and w.plain and w.kv_facts.identity:
        unclean = by_token = False
    elif lie and tokens:
        unclean, by_token = not w.plain, not w.kv_facts.identity
    else:
        unclean = by_token = False
        k, v = w.copied(k, v, w.plan.kv_order, 0.0)
    if found is None:
        return _Inputs(to_q, k, v, to_grad, end, delta, width, None, by_token, unclean)
    return _Inputs(q, k, v, grad, end, delta, width, (found, to_q, to_grad), by_token, unclean)


def _grad_q(w: Work, x: _Inputs, q: Tensor) -> Tensor:
    call, p = w.call, w.plan
    t = tuning_q(call.q_block, call.kv_block, x.width)
    direct = w.q_facts.distinct
    grad = _room(q, w.heads, direct, w.q_facts.complete, w.q_room)
    queries, keys = (1, 1, GROUP, x.width), (1, 1, t.tile, x.width)
    lists = (
        *w.row(p.owner), w.q_blocks,
        p.full_count, p.full_index, p.full_index.shape[-1],
        p.part_count, p.part_index, p.part_index.shape[-1], p.part_mask,
    )  # fmt: skip
    start(
        backward_q_kernel, w.batch * w.heads * w.q_blocks,
        _described(x.q, queries), _described(x.grad, queries), _described(x.k, keys), _described(x.v, keys),
        x.end, x.delta, (grad, grad.shape[2], grad.shape[3]), w.row(p.q_order),
        lists, masks.by_query(p.masks, call.kv_block), w.heads, w.heads // x.k.shape[1], w.q_room,
        call.scale * _LOG2E, call.scale,
        BM=GROUP, BN=t.tile, BK=call.kv_block, D=x.width, STAGES=t.stages, GROUPS=call.q_block // GROUP, DIRECT=direct,
        num_warps=GROUP // 16, maxnreg=t.registers,
    )  # fmt: skip
    return grad if direct else _folded(w, grad, p.q_order, q, 1)


def _grad_kv(w: Work, x: _Inputs, k: Tensor, v: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values; those of queries are added to `sums`."""
    call, t = w.call, tuning_kv(w.call.q_block, w.call.kv_block, x.width)
    units, lists, words, cut = w.noted(("by key", t.tile), lambda: _by_key(w, t.tile, k.shape[1]))
    direct = w.kv_facts.distinct and units.kv_step == 1
    outs = [_room(y, units.count, direct, w.kv_facts.complete, w.room) for y in (k, v)]
    to, order = [(y, y.shape[2], y.shape[3]) for y in outs], w.row(w.plan.kv_order)
    queries, keys = (1, 1, t.tile, x.width), (1, 1, GROUP, x.width)
    columns = share(t.tile, GROUP, x.width)[1]
    swizzle = None if sums is None or columns == x.width else 2 * columns  # bytes by which products take keys apart
    ends = [_described(e.view(-1), (t.tile,)) for e in (x.end, x.delta)]
    cleaned = (None, None, None)
    if x.cleaned is not None:
        cleaned = x.cleaned[0], *(_described(y, queries) for y in x.cleaned[1:])
    pieces, portion_sums = w.batch * units.count * w.kv_blocks, None
    if cut is not None:
        pieces = cut.programs.shape[0]
        portion_sums = torch.empty(cut.places, 2, call.kv_block, x.width, dtype=torch.float32, device=k.device)
    counter = None
    if t.buffers > 1:
        counter = torch.zeros(1, dtype=torch.int32, device=k.device) if sums is None else sums[-1].view(torch.int32)
    start(
        backward_kv_kernel, pieces if counter is None else min(pieces, processors(k.device)),
        _described(x.q, queries), _described(x.grad, queries), _described(x.k, keys, swizzle), _described(x.v, keys),
        *ends, *cleaned, sums, *to, portion_sums, order, lists, words, None if cut is None else cut.programs,
        counter, pieces, units.count, units.rows, units.count // x.k.shape[1],
        w.heads, w.q_room, w.batch * w.heads * w.q_room, call.scale * _LOG2E, call.scale,
        BM=t.tile, BN=GROUP, BQ=call.q_block, D=x.width, STAGES=t.stages, WHOLE=sums is not None,
        GROUPS=call.kv_block // GROUP, BUFFERS=t.buffers, DIRECT=direct, CLEAN=x.unclean, BY_TOKEN=x.by_token,
        num_warps=GROUP // 16, maxnreg=t.registers,
    )  # fmt: skip
    if cut is not None:
        start(
            portions_kernel, cut.cut.shape[0] * (call.kv_block // defaults.ROWS),
            portion_sums, cut.cut, *to, order, units.count, w.kv_blocks, units.rows,
            W=x.width, KB=call.kv_block, BN=defaults.ROWS, DIRECT=direct,
        )  # fmt: skip
    if direct:
        return outs[0], outs[1]
    grad_k, grad_v = (_folded(w, y, w.plan.kv_order, like, units.kv_step) for y, like in zip(outs, (k, v), strict=True))
    return grad_k, grad_v


def _by_key(w: Work, tile: int, kv_heads: int) -> tuple[Units, tuple[Any, ...], Tensor, Portions | None]:
    """Lists by key block as the kernel takes them, words of masks, and long lists in portions."""
    p, blocks = w.plan, (w.call.q_block, w.call.kv_block)
    units = Units.of(p, w.heads, kv_heads)
    full, part = turned(p, w.kv_blocks)[0], steps(p, blocks, tile, GROUP)
    lists = (
        *w.row(p.owner), w.kv_blocks, full.begin, full.count, full.index,
        part.begin, part.count, part.index, part.mask,
    )  # fmt: skip
    return units, lists, masks.by_key(p.masks, blocks[1]), portions(w, units, full, part, blocks[0] // tile)


def _from_sums(w: Work, q: Tensor, sums: Tensor) -> Tensor:
    (b, h, n, d), order, direct = q.shape, w.plan.q_order, w.q_facts.distinct
    out = _room(q, h, True, w.q_facts.complete or not direct, w.q_room)
    back = None if direct else Slots.of(order, n)
    slots, starts = (order, order) if back is None else (back.slots, back.starts)
    tiles = -(-(w.q_room if direct else n) // defaults.ROWS)
    start(
        after_kernel, b * h * tiles,
        sums, out, w.row(slots), w.row(starts), h, n, w.q_room, tiles, w.call.scale,
        D=d, W=sums.shape[1], BN=defaults.ROWS, DIRECT=direct,
    )  # fmt: skip
    return out


def _folded(w: Work, slots: Tensor, order: Tensor, like: Tensor, split: int) -> Tensor:
    """[B, heads * split, room, D] summed into a gradient in the shape of `like`."""
    b, heads, n, d = like.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    back, tiles = Slots.of(order, n), -(-n // defaults.ROWS)
    start(
        fold_kernel, b * heads * tiles,
        slots, out, w.row(back.slots), w.row(back.starts), heads, split, w.heads // (heads * split),
        n, order.shape[-1], tiles, D=d, WD=defaults.padded(d), BN=defaults.ROWS,
    )  # fmt: skip
    return out


def _room(like: Tensor, heads: int, direct: bool, complete: bool, slots: int) -> Tensor:
    """Where gradients go: rows of tokens, zero where some have no slot, or float32 rows of slots."""
    b, _, n, d = like.shape
    if not direct:
        return torch.empty(b, heads, slots, d, dtype=torch.float32, device=like.device)
    return (torch.empty if complete else torch.zeros)(b, heads, n, d, dtype=like.dtype, device=like.device)


def _readable(t: Tensor) -> bool:
    """Whether TMA reads [B, H, N, D]: rows without gaps, everything at multiples of 16 bytes."""
    step = 16 // t.element_size()
    long = [s for s, n in zip(t.stride()[:3], t.shape, strict=False) if n > 1]
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(s > 0 and s % step == 0 for s in long)


def _described(t: Tensor, box: tuple[int, ...], swizzle: int | None = None) -> Any:
    """Descriptor of boxes of t, of the same rank; entries outside t read as 0."""
    step = 16 // t.element_size()  # the stride of an axis of one entry is of no use, but must be legal
    strides = [s if n > 1 else step for s, n in zip(t.stride()[:-1], t.shape, strict=False)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], list(box), _layout(box, t.dtype, swizzle))


@lru_cache
def _layout(box: tuple[int, ...], dtype: torch.dtype, swizzle: int | None) -> Any:
    if swizzle is not None:
        return gl.NVMMASharedLayout(swizzle, 8 * dtype.itemsize, len(box))
    return gl.NVMMASharedLayout.get_default_for(list(box), _TYPES[dtype])
