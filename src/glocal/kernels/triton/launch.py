"""Calls of the Triton kernels: forward and backward, results by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.kernels import _blockwise
from glocal.kernels._jobs import Limits, Units
from glocal.kernels.call import Call, DenseBias, Grads
from glocal.kernels.triton import defaults
from glocal.kernels.triton.backward_kv import backward_kv_kernel
from glocal.kernels.triton.backward_q import backward_q_kernel
from glocal.kernels.triton.bias import BiasGrads
from glocal.kernels.triton.forward_q import forward_kernel
from glocal.kernels.triton.lists import Slots, turned
from glocal.kernels.triton.masks import fragments
from glocal.kernels.triton.merge import fold_kernel, merge_kernel
from glocal.kernels.triton.ordered import ordered_rows_kernel
from glocal.kernels.triton.work import Work, box, box_width, boxed, on_device, prepare, start, strided

_BIAS = Limits(keys=1 << 18, scores=1 << 26)
_SPREAD = 2  # key slots a key from which keys are gathered where they lie instead of copied into slots


@dataclass(frozen=True, eq=False)
class Known:
    """What backward is given: gradients of out and LSE, out and LSE."""

    grad_out: Tensor
    grad_lse: Tensor
    out: Tensor
    lse: Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    w = prepare(q, k, v, call)
    b, h, nq, _ = q.shape
    whole = w.q_facts.distinct and w.q_facts.complete
    shape = (b, h, nq, v.shape[3])
    nothing = 0 in shape or k.shape[2] == 0 or w.q_room == 0 or w.room == 0
    if nothing or not whole:
        out, lse = q.new_zeros(shape), q.new_full(shape[:3], -torch.inf, dtype=torch.float32)
    else:
        out, lse = q.new_empty(shape), q.new_empty(shape[:3], dtype=torch.float32)
    if nothing:
        return out, lse
    with on_device(q):
        if w.q_facts.distinct:
            _forward(w, q, k, v, out, lse)
            return out, lse
        partial = torch.empty(b, h, w.q_room, v.shape[3], dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(b, h, w.q_room, dtype=torch.float32, device=q.device)
        _forward(w, q, k, v, partial, partial_lse)
        back, tiles = Slots.of(w.plan.q_order, nq), -(-nq // defaults.ROWS)
        start(
            merge_kernel, b * h * tiles,
            partial, partial_lse, out, lse, w.row(back.slots), w.row(back.starts), h, nq, w.q_room, tiles,
            DV=v.shape[3], WDV=w.sizes["WDV"], BN=defaults.ROWS,
        )  # fmt: skip
    return out, lse


def _forward(w: Work, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Into rows by token where slots are distinct, else into slots (out has as many rows as it needs)."""
    p, tile = w.plan, w.tile("forward", q.element_size())
    if w.room > _SPREAD * k.shape[2] and w.room > w.q_room:
        own = torch.arange(k.shape[2], dtype=torch.int32, device=k.device)[None, None]
        keys = (k, v) if w.plain else w.copied(k, v, own, float("nan"))
        boxes = (None, None)
    else:
        keys = w.keys(k, v, float("nan"))
        boxes = tuple(box(t, tile["BN"], w.sizes[s]) for t, s in zip(keys, ("WD", "WDV"), strict=True))
    direct = w.q_facts.distinct
    start(
        forward_kernel, w.batch * w.heads * (w.q_room // tile["BM"]),
        strided(q), boxes[0], strided(keys[0]), boxes[1], strided(keys[1]), out, lse,
        w.row(p.q_order), w.row(p.kv_order), w.row(p.owner),
        (p.full_count, p.full_index, p.full_index.shape[-1]),
        (p.part_count, p.part_index, p.part_index.shape[-1], p.part_mask),
        fragments(p.masks, w.call.kv_block, turned=False),
        w.score, w.heads, w.heads // w.key_heads, w.q_blocks, w.room, out.shape[2],
        DIRECT=direct, HOLES=w.kv_facts.holes, MASKS=w.masked, **w.sizes, **tile,
    )  # fmt: skip


def backward(known: Known, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Grads:
    """Gradients through out and LSE."""
    w = prepare(q, k, v, call)
    if 0 in (q.numel(), k.numel(), v.numel(), w.q_room, w.room):
        none = [torch.zeros_like(b.values if isinstance(b, DenseBias) else b.table) for b in call.bias]
        return Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), tuple(none))
    with on_device(q):
        rows = _rows(w, q, known)
        keys = w.keys(k, v, 0.0)
        bias = BiasGrads.of(w, q, k)
        grad_q = _grad_q(w, q, rows, keys, bias)
        grad_k, grad_v = _grad_kv(w, k, v, rows, keys, bias)
    if bias.elsewhere:
        given = (known.grad_out, known.grad_lse, q, k, v, known.out, known.lse)
        return Grads(grad_q, grad_k, grad_v, _blockwise.backward(*given, call, _BIAS).bias)
    return Grads(grad_q, grad_k, grad_v, bias.result(w, k.shape[2]))


@dataclass(frozen=True, eq=False)
class _Rows:
    """By query slot: q and gradient of out [B, Hq, room, D], LSE in base 2 and delta [B, Hq, room]."""

    q: Tensor
    grad: Tensor
    end: Tensor
    delta: Tensor


def _rows(w: Work, q: Tensor, known: Known) -> _Rows:
    b, h, n, d = q.shape
    grad, room = known.grad_out, w.q_room
    here = w.q_facts.identity and room == n and w.plain and boxed(q) and boxed(grad)
    to_q, to_grad = (q, grad) if here else (t.new_empty(b, h, room, box_width(t)) for t in (q, grad))
    end, delta = (torch.empty(b, h, room, dtype=torch.float32, device=q.device) for _ in range(2))
    tiles = -(-room // defaults.ROWS)
    start(
        ordered_rows_kernel, b * h * tiles,
        strided(q), strided(grad), strided(known.out), known.lse.contiguous(), known.grad_lse.contiguous(),
        to_q, to_grad, end, delta, w.row(w.plan.q_order), h, n, room, tiles, None, None,
        D=d, DV=grad.shape[3], PD=to_q.shape[3], PDV=to_grad.shape[3], WD=w.sizes["WD"], WDV=w.sizes["WDV"],
        BM=defaults.ROWS, COPY=not here,
    )  # fmt: skip
    return _Rows(to_q, to_grad, end, delta)


def _grad_q(w: Work, q: Tensor, rows: _Rows, keys: tuple[Tensor, Tensor], bias: BiasGrads) -> Tensor:
    p, (b, h, _, d) = w.plan, q.shape
    tile = w.tile("backward_q", q.element_size())
    direct = w.q_facts.distinct
    if direct:
        to = torch.empty_like(q, memory_format=torch.contiguous_format)
        if not w.q_facts.complete:
            to.zero_()
    else:
        to = torch.empty(b, h, w.q_room, d, dtype=torch.float32, device=q.device)
    wd, wdv = w.sizes["WD"], w.sizes["WDV"]
    constants = {name: value for name, value in w.sizes.items() if name not in ("DV", "WDV")}
    start(
        backward_q_kernel, b * h * (w.q_room // tile["BM"]),
        box(rows.q, tile["BM"], wd), box(rows.grad, tile["BM"], wdv),
        box(keys[0], tile["BN"], wd), box(keys[1], tile["BN"], wdv), rows.end, rows.delta, to,
        w.row(p.q_order), w.row(p.owner),
        (p.full_count, p.full_index, p.full_index.shape[-1]),
        (p.part_count, p.part_index, p.part_index.shape[-1], p.part_mask),
        fragments(p.masks, w.call.kv_block, turned=False),
        w.score, bias.pairs, h, h // w.key_heads, w.q_blocks, w.q_room, w.room, to.shape[2],
        DIRECT=direct, MASKS=w.masked, **constants, **tile,
    )  # fmt: skip
    return to if direct else _folded(w, to, p.q_order, q, 1)


def _grad_kv(
    w: Work, k: Tensor, v: Tensor, rows: _Rows, keys: tuple[Tensor, Tensor], bias: BiasGrads
) -> tuple[Tensor, Tensor]:
    p, tile = w.plan, w.tile("backward_kv", k.element_size())
    units = Units.of(p, w.heads, k.shape[1])
    direct = w.kv_facts.distinct and units.kv_step == 1
    outs = []
    for t in (k, v):
        if direct:
            outs.append(torch.empty_like(t, memory_format=torch.contiguous_format))
            if not w.kv_facts.complete:
                outs[-1].zero_()
        else:
            shape = (w.batch, units.count, w.room, t.shape[3])
            outs.append(torch.empty(shape, dtype=torch.float32, device=t.device))
    full, part = turned(p, w.kv_blocks)
    wd, wdv = w.sizes["WD"], w.sizes["WDV"]
    start(
        backward_kv_kernel, w.batch * units.count * (w.room // tile["BN"]),
        box(rows.q, tile["BM"], wd), box(rows.grad, tile["BM"], wdv),
        box(keys[0], tile["BN"], wd), box(keys[1], tile["BN"], wdv), rows.end, rows.delta,
        outs[0], outs[1], bias.columns, w.row(p.kv_order), w.row(p.owner),
        (full.begin, full.count, full.index), (part.begin, part.count, part.index, part.mask),
        fragments(p.masks, w.call.kv_block, turned=True),
        w.score, units.count, units.rows, units.count // w.key_heads, w.kv_blocks, w.q_room, outs[0].shape[2],
        DIRECT=direct, MASKS=w.masked, COLUMN=bias.columns is not None, **w.sizes, **tile,
    )  # fmt: skip
    if direct:
        return outs[0], outs[1]
    return _folded(w, outs[0], p.kv_order, k, units.kv_step), _folded(w, outs[1], p.kv_order, v, units.kv_step)


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
