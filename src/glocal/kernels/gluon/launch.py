"""Calls of the Hopper kernels: rows into plan order where they do not lie so, descriptors, results back to tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.gluon.boxes import Boxes, Seen, boxes_of, seen
from glocal.kernels.gluon.forward_q import forward_kernel
from glocal.kernels.gluon.masks import by_query, kept
from glocal.kernels.gluon.reblocked import halved, paired
from glocal.kernels.gluon.tuning import Shape, Tuning, padded, tuning
from glocal.kernels.triton.defaults import ROWS
from glocal.kernels.triton.lists import Slots
from glocal.kernels.triton.merge import merge_kernel
from glocal.kernels.triton.permute import gather_rows
from glocal.kernels.triton.work import Work, may_look, on_device, prepare, start
from glocal.plan.facts import OrderFacts

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True, eq=False)
class Source:
    """Rows for TMA, [B, H, rows, D]: in plan order, or by token where boxes are read."""

    t: Tensor
    boxes: Boxes | None = None
    seen: Seen | None = None

    def described(self, rows: int, columns: int) -> TensorDescriptor:
        """Of tiles of so many rows and columns."""
        t = self.t
        return TensorDescriptor(t, *_form(t.shape, t.stride(), t.dtype, self.seen, rows, columns))

    @property
    def where(self) -> tuple[Tensor, tuple[int, ...]] | None:
        """As the kernel takes it."""
        return None if self.boxes is None or self.seen is None else (self.boxes.corners, self.seen.lead)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the kernel reads. clean: k and v hold no bad values, and their keys are NaN."""

    q: Source
    k: Source
    v: Source
    clean: bool = False


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
        if w.q_facts.distinct:
            _attended(w, (q, k, v), (out, lse), tuned)
            return out, lse
        slots = torch.empty(b, h, w.q_room, v.shape[3], dtype=torch.float32, device=q.device)
        slots_lse = torch.empty(b, h, w.q_room, dtype=torch.float32, device=q.device)
        _attended(w, (q, k, v), (slots, slots_lse), tuned)
        back, tiles = Slots.of(w.plan.q_order, nq), -(-nq // ROWS)
        start(
            merge_kernel, b * h * tiles,
            slots, slots_lse, out, lse, w.row(back.slots), w.row(back.starts), h, nq, w.q_room, tiles,
            DV=v.shape[3], WDV=w.sizes["WDV"], BN=ROWS,
        )  # fmt: skip
    return out, lse


def work_of(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Work:
    """The call as the kernel takes it, query blocks in pairs, or key blocks in halves, where that pays."""
    w = prepare(q, k, v, call)
    found = w.noted("reblocked", lambda: _reblocked(w))
    if found is None:
        return w
    plan, (q_block, kv_block) = found
    return replace(w, plan=plan, call=replace(w.call, plan=plan, q_block=q_block, kv_block=kv_block))


def _reblocked(w: Work) -> tuple[PlanTensors, tuple[int, int]] | None:
    """The plan in other blocks and those; that waits for the device, so lists made for one call are not looked at."""
    if not may_look(w.plan.full_index):
        return None
    blocks, wide = (w.call.q_block, w.call.kv_block), max(w.sizes["WD"], w.sizes["WDV"])
    if blocks not in ((64, 64), (128, 128)) or not 64 < wide <= 128:
        return None
    plan = paired(w.plan, 64) if blocks == (64, 64) else halved(w.plan, 128)
    return None if plan is None else (plan, (128, 64))


def _attended(w: Work, qkv: tuple[Tensor, Tensor, Tensor], to: tuple[Tensor, Tensor], tuned: Tuning | None) -> None:
    """The kernel, and where pairs of a listed block are hidden and the result is not finite, once more with k and v
    whose bad rows are cleaned: 0 * NaN is NaN, so a bad value reaches those who do not see it.

    The device decides; most results are finite, and then both k and v are read where they lie.
    """
    given = placed(w, *qkv, tuned)
    if w.plain or given.clean:
        run(w, given, *to, tuned)
        return
    where = {"dtype": torch.int32, "device": qkv[0].device}
    yes, found = w.noted("yes", lambda: torch.ones(4, **where)), torch.zeros(4, **where)
    run(w, given, *to, tuned, (yes, found))
    boxes = given.k.boxes
    order = w.plan.kv_order if boxes is None else boxes.raster
    k, v = (_source(t, boxes) for t in w.copied(qkv[1], qkv[2], order, float("nan"), found))
    run(w, Inputs(given.q, k, v, clean=True), *to, tuned, (found, yes))


def placed(w: Work, q: Tensor, k: Tensor, v: Tensor, tuned: Tuning | None = None) -> Inputs:
    """q, k, v where they lie if their rows are in plan order or their tiles are boxes, else copied."""
    tuned = _tuned(w) if tuned is None else tuned
    if w.call.scale <= 0:  # the kernel takes the largest logit before it scales
        q = -q if w.call.scale < 0 else torch.zeros_like(q)
    from_q = Source(_lined(q)) if w.q_facts.identity else _boxed([q], w.plan.q_order, 64, w.q_facts)[0]
    if from_q is None:
        from_q = Source(_lined(*gather_rows([q], w.plan.q_order)))
    if w.kv_facts.identity:
        return Inputs(from_q, Source(_lined(k)), Source(_lined(v)))
    rows = min(tuned.keys, w.call.kv_block)
    from_k, from_v = _boxed([k, v], w.plan.kv_order, rows, w.kv_facts)
    if from_k is None or from_v is None:
        k, v = w.copied(k, v, w.plan.kv_order, float("nan"))
        return Inputs(from_q, Source(k), Source(v), clean=True)
    return Inputs(from_q, from_k, from_v)


def _boxed(tensors: list[Tensor], order: Tensor, rows: int, facts: OrderFacts) -> list[Source | None]:
    """Tensors read in boxes of `rows` tokens, None each where that cannot be."""
    known = facts.fixed and facts.distinct  # else the order may be one of many, none of which is worth a look
    boxes = boxes_of(order, tensors[0].shape[2], rows) if known and all(map(_legal, tensors)) else None
    if boxes is None or any(seen(t, boxes) is None for t in tensors):
        return [None] * len(tensors)
    return [_source(t, boxes) for t in tensors]


def _source(t: Tensor, boxes: Boxes | None) -> Source:
    return Source(t, boxes, None if boxes is None else seen(t, boxes))


def run(
    w: Work,
    given: Inputs,
    out: Tensor,
    lse: Tensor,
    tuned: Tuning | None = None,
    flags: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """The kernel over all query blocks; out [B, Hq, n, Dv] and lse [B, Hq, n] by token, or by slot if slots repeat.

    flags: as in `forward_kernel`.
    """
    q, k, v, p = given.q, given.k, given.v, w.plan
    blocks = w.call.q_block, w.call.kv_block
    dims = w.sizes["D"], w.sizes["DV"]
    tuned = _tuned(w) if tuned is None else tuned
    shape = Shape.of(blocks, dims, w.masked, tuned)
    tiles, rows = w.batch * w.heads * w.q_blocks, min(shape.keys, shape.block)
    scale = abs(w.call.scale) if w.call.scale else 1.0
    order = w.row(p.q_order) if w.q_facts.distinct and not w.q_facts.identity else None
    persistent = 1 if given.clean and flags[0] is not None else tuned.persistent  # mostly there is nothing to do
    programs = min(tiles, persistent * _processors(out.device.index)) if persistent else tiles
    start(
        forward_kernel, programs,
        q.described(64, shape.d), k.described(rows, min(shape.d, 64)), v.described(rows, min(shape.dv, 64)),
        (q.where, k.where, v.where),
        (out, lse, order, out.shape[2]),
        (
            w.row(p.owner),
            (p.full_count, p.full_index, p.full_index.shape[-1]),
            (p.part_count, p.part_index, p.part_index.shape[-1], p.part_mask),
            p.masks.shape[0],
        ),
        (by_query(p.masks, blocks[1]), w.row(kept(p.kv_order, blocks[1])) if w.kv_facts.holes else None),
        (_tiles(w)[0], w.heads, w.q_blocks), w.heads // k.t.shape[1],
        (float(scale), None if w.call.softcap is None else float(w.call.softcap)), tiles, flags,
        C=shape, num_warps=4, maxnreg=tuned.most,
    )  # fmt: skip


def _tiles(w: Work) -> tuple[Tensor | None, bool]:
    """Made once for a kind of call."""
    return w.noted("tiles", lambda: tiles_of(w))


def tiles_of(w: Work) -> tuple[Tensor | None, bool]:
    """The tiles, int32 [B * H * blocks, 4]: number, row in the lists, partial key blocks, all key blocks; and whether
    each has one.

    They lie by falling number of key blocks, equal ones in the order of memory, every other round of programs from the
    last to the first, so that all get as much. (None, False) where the plan is not known to stay. Looking waits for the
    device.
    """
    p, blocks = w.plan, w.q_blocks
    if not may_look(p.full_index):
        return None, False
    of = p.owner.long().repeat_interleave(w.heads // p.owner.shape[1], 1).expand(w.batch, w.heads)
    place = (of[..., None] * blocks + torch.arange(blocks, device=of.device)).flatten()
    part = p.part_count.flatten()[place]
    every = part + p.full_count.flatten()[place]
    order, side = every.argsort(descending=True, stable=True), _processors(of.device.index)
    rounds = torch.nn.functional.pad(order, (0, -order.numel() % side), value=-1).view(-1, side)
    if bool((every != every[:1]).any()):
        rounds[1::2] = rounds[1::2].flip(1)
    order = rounds[rounds >= 0]
    return torch.stack([order, place[order], part[order], every[order]], 1).int(), bool((every > 0).all())


def _tuned(w: Work) -> Tuning:
    blocks, width = (w.call.q_block, w.call.kv_block), max(padded(w.sizes["D"]), padded(w.sizes["DV"]))
    return tuning(blocks, width, _tiles(w)[1])


def _lined(t: Tensor) -> Tensor:
    """t [B, H, N, D], copied if TMA cannot read it."""
    return t if _legal(t) else t.contiguous()


def _legal(t: Tensor) -> bool:
    """Whether TMA reads t [B, H, N, D]: rows contiguous, steps of 16 bytes."""
    each = 16 // t.element_size()
    steps = [s for s, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1]
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(s > 0 and s % each == 0 for s in steps)


@lru_cache
def _form(
    sizes: tuple[int, ...], steps: tuple[int, ...], dtype: torch.dtype, seen: Seen | None, rows: int, columns: int
) -> tuple[list[int], list[int], list[int], Any]:
    """Sizes, strides, box and layout of a descriptor; where there is one step only, its stride does not count."""
    shape, strides, box = sizes[:3], steps[:3], (1, 1, rows)
    if seen is not None:
        shape, strides, box = seen.shape, seen.strides, seen.box
    strides = [s if n > 1 else 16 // dtype.itemsize for s, n in zip(strides, shape, strict=True)]
    box = [*box, columns]
    return [*shape, sizes[3]], [*strides, 1], box, gl.NVMMASharedLayout.get_default_for(box, _DTYPES[dtype])


@lru_cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
