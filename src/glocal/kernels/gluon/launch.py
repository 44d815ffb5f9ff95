"""Calls of the Hopper kernels: rows into plan order where they do not lie so, descriptors, results back to tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from glocal.kernels.call import Call
from glocal.kernels.gluon.forward_q import forward_kernel
from glocal.kernels.gluon.masks import by_query, kept
from glocal.kernels.gluon.paired import paired
from glocal.kernels.gluon.tuning import Shape, Tuning, padded, tuning
from glocal.kernels.triton.defaults import ROWS
from glocal.kernels.triton.lists import Slots
from glocal.kernels.triton.merge import merge_kernel
from glocal.kernels.triton.permute import gather_rows
from glocal.kernels.triton.work import Work, on_device, prepare, start
from glocal.plan.facts import worth_a_look

# Per plan, by its full lists: lengths of the lists, whether all are equal, and tiles by falling length.
_ORDERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True, eq=False)
class Inputs:
    """q, k, v with rows in plan order, [B, H, rows, D] with strides that TMA takes."""

    q: Tensor
    k: Tensor
    v: Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, tuned: Tuning | None = None) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    w = work_of(q, k, v, call)
    b, h, nq, _ = q.shape
    shape = (b, h, nq, v.shape[3])
    nothing = 0 in shape or k.shape[2] == 0 or w.q_room == 0 or w.room == 0
    if nothing or not (w.q_facts.distinct and w.q_facts.complete):
        out, lse = q.new_zeros(shape), q.new_full(shape[:3], -torch.inf, dtype=torch.float32)
    else:
        out, lse = q.new_empty(shape), q.new_empty(shape[:3], dtype=torch.float32)
    if nothing:
        return out, lse
    with on_device(q):
        given = placed(w, q, k, v)
        if w.q_facts.distinct:
            run(w, given, out, lse, tuned)
            return out, lse
        slots = torch.empty(b, h, w.q_room, v.shape[3], dtype=torch.float32, device=q.device)
        slots_lse = torch.empty(b, h, w.q_room, dtype=torch.float32, device=q.device)
        run(w, given, slots, slots_lse, tuned)
        back, tiles = Slots.of(w.plan.q_order, nq), -(-nq // ROWS)
        start(
            merge_kernel, b * h * tiles,
            slots, slots_lse, out, lse, w.row(back.slots), w.row(back.starts), h, nq, w.q_room, tiles,
            DV=v.shape[3], WDV=w.sizes["WDV"], BN=ROWS,
        )  # fmt: skip
    return out, lse


def work_of(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Work:
    """The call as the kernel takes it, query blocks in pairs where that pays."""
    w = prepare(q, k, v, call)
    blocks = w.call.q_block, w.call.kv_block
    wide = max(w.sizes["WD"], w.sizes["WDV"])
    if blocks != (64, 64) or wide <= 64 or wide > 128 or not worth_a_look(w.plan.full_index):
        return w
    plan = paired(w.plan, blocks[1])
    return w if plan is None else replace(w, plan=plan, call=replace(w.call, plan=plan, q_block=2 * blocks[0]))


def placed(w: Work, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """q, k, v in plan order. Where pairs of a listed block may be hidden, k and v are copied and bad rows cleaned."""
    if w.call.scale <= 0:  # the kernel takes the largest logit before it scales
        q = -q if w.call.scale < 0 else torch.zeros_like(q)
    if not w.q_facts.identity:
        (q,) = gather_rows([q], w.plan.q_order)
    if not (w.kv_facts.identity and w.plain):
        k, v = w.copied(k, v, w.plan.kv_order, float("nan"))
    return Inputs(_lined(q), _lined(k), _lined(v))


def run(w: Work, given: Inputs, out: Tensor, lse: Tensor, tuned: Tuning | None = None) -> None:
    """The kernel over all query blocks; out [B, Hq, n, Dv] and lse [B, Hq, n] by token, or by slot if slots repeat."""
    q, k, v, p = given.q, given.k, given.v, w.plan
    blocks = w.call.q_block, w.call.kv_block
    dims = w.sizes["D"], w.sizes["DV"]
    tuned = tuning(blocks, max(padded(d) for d in dims)) if tuned is None else tuned
    shape = Shape.of(blocks, dims, w.masked, tuned)
    tiles = w.batch * w.heads * w.q_blocks
    scale = abs(w.call.scale) if w.call.scale else 1.0
    order = w.row(p.q_order) if w.q_facts.distinct and not w.q_facts.identity else None
    longest_first = _longest_first(w)
    programs = tiles
    if tuned.persistent and longest_first is None:
        programs = min(tiles, _processors(q.device.index))
    start(
        forward_kernel, programs,
        _described(q, 64, shape.d), _described(k, shape.keys, shape.d), _described(v, shape.keys, shape.dv),
        (out, lse, order, out.shape[2]),
        (
            w.row(p.owner),
            (p.full_count, p.full_index, p.full_index.shape[-1]),
            (p.part_count, p.part_index, p.part_index.shape[-1], p.part_mask),
            p.masks.shape[0],
        ),
        (by_query(p.masks, blocks[1]), w.row(kept(p.kv_order, blocks[1])) if w.kv_facts.holes else None),
        (longest_first, w.heads, w.q_blocks), w.heads // k.shape[1],
        (float(scale), None if w.call.softcap is None else float(w.call.softcap)), tiles,
        C=shape, num_warps=4, maxnreg=tuned.most,
    )  # fmt: skip


def _longest_first(w: Work) -> Tensor | None:
    """Tiles by falling number of key blocks, int32 [B * H * blocks], equal ones in the order of memory; None: as they
    lie, because all are equal or the plan is not known to stay.

    Looked at once for each plan, unless it changes; that waits for the device, so lists made for one call are not.
    """
    p = w.plan
    mark = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in (p.owner, p.full_count, p.part_count))
    known = _ORDERS.get(p.full_index)
    if known is None or known[0] != mark:
        if not worth_a_look(p.full_index) or torch.cuda.is_current_stream_capturing():
            return None
        visits = p.full_count + p.part_count  # [U, blocks]
        known = _ORDERS[p.full_index] = (mark, visits, bool((visits == visits.flatten()[:1]).all()), {})
    _, visits, even, made = known
    if even:
        return None
    if (w.batch, w.heads) not in made:
        if torch.cuda.is_current_stream_capturing():
            return None
        of = p.owner.long().repeat_interleave(w.heads // p.owner.shape[1], 1).expand(w.batch, w.heads)
        made[w.batch, w.heads] = visits[of].flatten().argsort(descending=True, stable=True).int()
    return made[w.batch, w.heads]


def _lined(t: Tensor) -> Tensor:
    """t [B, H, N, D], copied if TMA cannot read it: rows contiguous, steps of 16 bytes."""
    each = 16 // t.element_size()
    steps = [s for s, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1]
    legal = t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(s > 0 and s % each == 0 for s in steps)
    return t if legal else t.contiguous()


def _described(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles [1, 1, rows, columns] of t [B, H, N, D]; where there is one step only, its stride does not count."""
    any_step = 16 // t.element_size()
    strides = [s if n > 1 else any_step for s, n in zip(t.stride()[:3], t.shape[:3], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, columns], _layout(rows, columns, t.dtype))


@lru_cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], _DTYPES[dtype])


@lru_cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
