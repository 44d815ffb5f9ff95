"""Calls of the Hopper kernels: rows into plan order where they do not lie so, descriptors, results back to tokens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.gluon.facts import Facts, facts
from glocal.kernels.gluon.forward_q import forward_kernel
from glocal.kernels.gluon.masks import by_query, kept
from glocal.kernels.gluon.repair import repair_kernel
from glocal.kernels.gluon.tuning import Tuning, padded, tuning
from glocal.kernels.triton.defaults import ROWS
from glocal.kernels.triton.defaults import tuning as triton_tuning
from glocal.kernels.triton.lists import Slots
from glocal.kernels.triton.merge import merge_kernel
from glocal.kernels.triton.refine import cut

# Per plan (by its full lists): tiles by falling length, and plans cut into smaller key blocks.
_ORDERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_CUT: WeakIdKeyDictionary = WeakIdKeyDictionary()
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_KERNEL: Any = forward_kernel
_MERGE: Any = merge_kernel
_REPAIR: Any = repair_kernel


@dataclass(frozen=True, eq=False)
class Inputs:
    """q, k, v as given (`raw`), and with rows in plan order and strides that TMA takes (`placed`)."""

    raw: tuple[Tensor, Tensor, Tensor]
    placed: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Outputs:
    """out [B, Hq, n, Dv] and lse [B, Hq, n], contiguous; order: the plan's q_order where rows go to tokens, or None."""

    out: Tensor
    lse: Tensor
    order: Tensor | None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, tuned: Tuning | None = None) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    assert call.plan is not None
    b, h, nq, _ = q.shape
    room, dv = call.plan.q_order.shape[-1], v.shape[3]
    if 0 in (b, h, nq, k.shape[2], room):
        return q.new_zeros(b, h, nq, dv), q.new_full((b, h, nq), -torch.inf, dtype=torch.float32)
    call = _fitting(call, max(padded(q.shape[3]), padded(dv)))
    p = call.plan
    assert p is not None
    known = facts(p, (call.q_block, call.kv_block), nq, k.shape[2])
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if call.scale <= 0:  # the kernel takes the largest logit before it scales
            q = -q if call.scale < 0 else torch.zeros_like(q)
            call = replace(call, scale=-call.scale if call.scale < 0 else 1.0)
        given = Inputs((q, k, v), placed(q, k, v, p, known))
        if known.once:
            out = torch.empty(b, h, nq, dv, dtype=q.dtype, device=q.device)
            lse = torch.empty(b, h, nq, dtype=torch.float32, device=q.device)
            if not known.every:
                out.zero_(), lse.fill_(-torch.inf)
            run(given, Outputs(out, lse, None if known.q_lies else p.q_order), call, known, tuned)
            return out, lse
        slots = torch.empty(b, h, room, dv, dtype=torch.float32, device=q.device)
        slots_lse = torch.empty(b, h, room, dtype=torch.float32, device=q.device)
        run(given, Outputs(slots, slots_lse, None), call, known, tuned)
        return _merged(slots, slots_lse, p.q_order, q.new_empty(b, h, nq, dv))


def placed(q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, known: Facts) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with rows in plan order and strides that TMA takes; k and v get heads of their own where the order has."""
    if not known.kv_lies and plan.kv_order.shape[1] > k.shape[1]:
        times = plan.kv_order.shape[1] // k.shape[1]
        k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for t in (k, v))
    if not known.q_lies:
        (q,) = gather_rows([q], plan.q_order)
    if not known.kv_lies:
        k, v = gather_rows([k, v], plan.kv_order)
    return _lined(q), _lined(k), _lined(v)


def gather_rows(tensors: list[Tensor], order: Tensor) -> list[Tensor]:
    """[B, H, N, D] each and an order int32 [B|1, H|1, M] -> [B, H, M, D] each; -1 gives rows of 0."""
    out = []
    for t in tensors:
        b, h, _, d = t.shape
        at = order.long().repeat_interleave(h // order.shape[1], 1).expand(b, h, -1)[..., None]  # [B, H, M, 1]
        rows = t.gather(2, at.clamp(min=0).expand(-1, -1, -1, d))
        out.append(rows.masked_fill_(at < 0, 0))
    return out


def run(given: Inputs, to: Outputs, call: Call, known: Facts, tuned: Tuning | None = None) -> None:
    """The kernel over all query blocks."""
    assert call.plan is not None
    p, (q, k, v) = call.plan, given.placed
    b, h, n, dv = to.out.shape
    bq, bk, parts = call.q_block, call.kv_block, call.q_block // 64
    wide, wide_v = padded(q.shape[3]), padded(dv)
    tuned = tuning(bq, bk, max(wide, wide_v)) if tuned is None else tuned
    blocks = p.q_order.shape[-1] // bq
    tiles = b * h * blocks
    masked = known.masked or known.padded
    ill = torch.empty(tiles * parts if masked else 0, dtype=torch.int32, device=q.device)
    order = None if to.order is None else _row(to.order, h)
    lists = _row(p.owner, h), _full(p), _part(p)
    cap = None if call.softcap is None else float(call.softcap)
    programs = min(tiles, _processors(q.device.index) * tuned.ctas) if tuned.persistent else tiles
    _KERNEL[(programs,)](
        _described(q, 64, wide), _described(k, bk, wide), _described(v, bk, wide_v),
        (to.out, to.lse, order, n, ill), (*lists, p.masks.shape[0]), by_query(p.masks, bk),
        _row(kept(p.kv_order, bk), h) if known.padded else None,
        (None if known.even else _longest_first(p, b, h), h, blocks), h // k.shape[1], (float(call.scale), cap), tiles,
        BQ=bq, BK=bk, REAL=dv, MASKED=masked, STAGES=tuned.stages, REGISTERS=tuned.registers,
        EMULATE=tuned.emulate, QREG=tuned.held, PIN=tuned.pinned, QUERIES=tuned.queries,
        num_warps=4, maxnreg=tuned.most,
    )  # fmt: skip
    if masked:
        q, k, v = given.raw
        how = triton_tuning(max(bq, bk), max(wide, wide_v), backward=False)
        _REPAIR[(tiles,)](
            ill, _strided(q), _strided(k), _strided(v), to.out, to.lse, order, n, _row(p.q_order, h),
            _row(p.kv_order, h), lists[0], lists[1], lists[2], p.masks, (float(call.scale), cap, None, None, None),
            h, h // k.shape[1], blocks, PARTS=parts, D=q.shape[3], DV=dv, WD=wide, WDV=wide_v, BQ=bq, BK=bk,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip


def _merged(slots: Tensor, slots_lse: Tensor, order: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Queries with several slots: what each saw, merged into `out` [B, Hq, Nq, Dv] and its LSE."""
    b, h, n, dv = out.shape
    lse = torch.empty(b, h, n, dtype=torch.float32, device=out.device)
    back, tiles = Slots.of(order, n), -(-n // ROWS)
    _MERGE[(b * h * tiles,)](
        slots, slots_lse, out, lse, _row(back.slots, h), _row(back.starts, h), h, n, slots.shape[2], tiles,
        DV=dv, WDV=padded(dv), BN=ROWS,
    )  # fmt: skip
    return out, lse


def _fitting(call: Call, width: int) -> Call:
    """Key blocks of 128 do not fit beside accumulators of more than 128 columns: the same call with blocks of 64."""
    if width <= 128 or call.kv_block <= 64:
        return call
    assert call.plan is not None
    mark = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in vars(call.plan).values()]
    known = _CUT.get(call.plan.full_index)
    if known is None or known[0] != mark:
        known = _CUT[call.plan.full_index] = (mark, cut(call.plan, 1, call.kv_block // 64))
    return replace(call, plan=known[1], kv_block=64)


def _longest_first(plan: PlanTensors, batch: int, heads: int) -> Tensor:
    """Tiles by falling number of key blocks, int32 [B * H * blocks]; equal ones in the order of memory. Cached."""
    known = _ORDERS.get(plan.full_index)
    mark = (plan.owner.data_ptr(), plan.full_count._version, plan.part_count._version, batch, heads)
    if known is None or known[0] != mark:
        visits = plan.full_count + plan.part_count  # [U, blocks]
        of = plan.owner.long().repeat_interleave(heads // plan.owner.shape[1], 1).expand(batch, heads)
        order = visits[of].flatten().argsort(descending=True, stable=True).int()
        known = _ORDERS[plan.full_index] = (mark, order)
    return known[1]


def _full(p: PlanTensors) -> tuple[Any, ...]:
    return p.full_count, p.full_index, p.full_index.shape[-1]


def _part(p: PlanTensors) -> tuple[Any, ...]:
    return p.part_count, p.part_index, p.part_index.shape[-1], p.part_mask


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
    layout: Any = gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], _DTYPES[t.dtype])
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, columns], layout)


def _strided(t: Tensor) -> tuple[Any, ...]:
    return (t, *t.stride())


def _row(t: Tensor, heads: int) -> tuple[Any, ...]:
    samples, own = t.shape[0], t.shape[1]
    return (t, t.stride(0) if samples > 1 else 0, t.stride(1) if own > 1 else 0, heads // own)


@lru_cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
