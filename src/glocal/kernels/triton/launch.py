"""Calls of the Triton kernels: strides and sizes as tuples, results in plan order, and back to tokens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.kernels import _blockwise
from glocal.kernels._jobs import Limits, Units
from glocal.kernels.call import Call, DenseBias, Grads, PlanTensors, TableBias
from glocal.kernels.triton.backward_kv import backward_kv_kernel
from glocal.kernels.triton.backward_q import backward_q_kernel
from glocal.kernels.triton.defaults import ROWS, padded, tuning
from glocal.kernels.triton.forward_q import forward_kernel
from glocal.kernels.triton.lists import Slots, check, transposed
from glocal.kernels.triton.merge import fold_kernel, merge_kernel
from glocal.kernels.triton.refine import refined

_BIAS = Limits(keys=1 << 18, scores=1 << 26)


@dataclass(frozen=True, eq=False)
class Known:
    """What backward is given: gradients of out and LSE, out and LSE."""

    grad_out: Tensor
    grad_lse: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True, eq=False)
class _Work:
    """One call as the kernels take it. plan: contiguous int32. score: the tuple of `tile.py`. sizes: constants."""

    call: Call
    plan: PlanTensors
    batch: int
    heads: int
    group: int
    score: tuple[Any, ...]
    sizes: dict[str, Any]
    width: int

    def tuned(self, *, backward: bool) -> dict[str, int]:
        """Warps and stages."""
        found = tuning(max(self.call.q_block, self.call.kv_block), self.width, backward=backward)
        return {"num_warps": found.warps, "num_stages": found.stages}

    def row(self, t: Tensor) -> tuple[Any, ...]:
        """A plan tensor [batch|1, heads|1, ...] for `row_of`."""
        return _row(t, self.heads)

    @property
    def q_blocks(self) -> int:
        """Query blocks."""
        return self.plan.q_order.shape[-1] // self.call.q_block

    @property
    def kv_blocks(self) -> int:
        """Key blocks."""
        return self.plan.kv_order.shape[-1] // self.call.kv_block


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    w = _work(q, k, v, call)
    b, h, nq, _ = q.shape
    dv, room = v.shape[3], w.plan.q_order.shape[-1]
    out = q.new_zeros(b, h, nq, dv)
    lse = q.new_full((b, h, nq), -torch.inf, dtype=torch.float32)
    if lse.numel() == 0 or k.shape[2] == 0 or room == 0:
        return out, lse
    partial = torch.empty(b, h, room, dv, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(b, h, room, dtype=torch.float32, device=q.device)
    p = w.plan
    with _device(q):
        _start(
            forward_kernel, b * h * w.q_blocks,
            _strided(q), _strided(k), _strided(v), partial, partial_lse,
            w.row(p.q_order), w.row(p.kv_order), w.row(p.owner), *_listed(p), p.masks,
            w.score, h, w.group, w.q_blocks, **w.sizes, **w.tuned(backward=False),
        )  # fmt: skip
        back, tiles = Slots.of(p.q_order, nq), -(-nq // ROWS)
        _start(
            merge_kernel, b * h * tiles,
            partial, partial_lse, out, lse, w.row(back.slots), w.row(back.starts), h, nq, room, tiles,
            DV=dv, WDV=w.sizes["WDV"], BN=ROWS,
        )  # fmt: skip
    return out, lse


def backward(known: Known, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Grads:
    """Gradients through out and LSE. Those of biases come from plain torch, block by block."""
    w = _work(q, k, v, call)
    if 0 in (q.numel(), k.numel(), v.numel(), w.plan.q_order.shape[-1], w.plan.kv_order.shape[-1]):
        none = [torch.zeros_like(b.values if isinstance(b, DenseBias) else b.table) for b in call.bias]
        return Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), tuple(none))
    empty = known.lse == -torch.inf
    end = known.lse.float().masked_fill(empty, torch.inf).contiguous()
    delta = (known.grad_out.float() * known.out.float()).sum(-1)
    delta = (delta - known.grad_lse.float().masked_fill(empty, 0)).contiguous()  # [B, Hq, Nq]
    with _device(q):
        grad_q = _grad_q(w, q, k, v, known.grad_out, (end, delta))
        grad_k, grad_v = _grad_kv(w, q, k, v, known.grad_out, (end, delta))
    bias = ()
    if call.bias:
        given = (known.grad_out, known.grad_lse, q, k, v, known.out, known.lse)
        bias = _blockwise.backward(*given, call, _BIAS).bias
    return Grads(grad_q, grad_k, grad_v, bias)


def _grad_q(w: _Work, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
    p, (b, h, nq, d) = w.plan, q.shape
    slots = torch.empty(b, h, p.q_order.shape[-1], d, dtype=torch.float32, device=q.device)
    _start(
        backward_q_kernel, b * h * w.q_blocks,
        _strided(q), _strided(k), _strided(v), _strided(grad), *known, slots,
        w.row(p.q_order), w.row(p.kv_order), w.row(p.owner), *_listed(p), p.masks,
        w.score, h, w.group, w.q_blocks, nq, **w.sizes, **w.tuned(backward=True),
    )  # fmt: skip
    return _folded(w, slots, p.q_order, q, 1)


def _grad_kv(
    w: _Work, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, known: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    p, b = w.plan, w.batch
    units = Units.of(p, w.heads, k.shape[1])
    full, part = transposed(p, (w.call.q_block, w.call.kv_block))
    assert part.mask is not None
    lists = (
        (full.count, full.index, full.index.shape[-1]),
        (part.count, part.index, part.index.shape[-1], part.mask),
    )
    to_k, to_v = (
        torch.empty(b, units.count, p.kv_order.shape[-1], t.shape[3], dtype=torch.float32, device=t.device)
        for t in (k, v)
    )
    _start(
        backward_kv_kernel, b * units.count * w.kv_blocks,
        _strided(q), _strided(k), _strided(v), _strided(grad), *known, to_k, to_v,
        w.row(p.q_order), w.row(p.kv_order), w.row(p.owner), *lists, p.masks,
        w.score, units.count, units.rows, units.kv_step, w.kv_blocks, q.shape[2],
        **w.sizes, **w.tuned(backward=True),
    )  # fmt: skip
    return _folded(w, to_k, p.kv_order, k, units.kv_step), _folded(w, to_v, p.kv_order, v, units.kv_step)


def _folded(w: _Work, slots: Tensor, order: Tensor, like: Tensor, split: int) -> Tensor:
    """[B, heads * split, room, D] summed into a gradient in the shape of `like`."""
    b, heads, n, d = like.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    back, tiles = Slots.of(order, n), -(-n // ROWS)
    _start(
        fold_kernel, b * heads * tiles,
        slots, out, w.row(back.slots), w.row(back.starts), heads, split, w.heads // (heads * split),
        n, order.shape[-1], tiles, D=d, WD=padded(d), BN=ROWS,
    )  # fmt: skip
    return out


def _work(q: Tensor, k: Tensor, v: Tensor, call: Call) -> _Work:
    assert call.plan is not None
    check(call.plan, (call.q_block, call.kv_block))
    widths = padded(q.shape[3]), padded(v.shape[3])
    call = refined(call, max(widths), q.element_size())
    assert call.plan is not None
    fields = call.plan.__dataclass_fields__
    return _Work(
        call=call,
        plan=PlanTensors(*(getattr(call.plan, name).int().contiguous() for name in fields)),
        batch=q.shape[0],
        heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        score=_score(q, k, call),
        sizes={
            "D": q.shape[3],
            "DV": v.shape[3],
            "WD": widths[0],
            "WDV": widths[1],
            "BQ": call.q_block,
            "BK": call.kv_block,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        },
        width=max(widths),
    )


def _score(q: Tensor, k: Tensor, call: Call) -> tuple[Any, ...]:
    """The kernels read one dense and one table bias: several dense ones are added up, further tables written out."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    tables = [b for b in call.bias if isinstance(b, TableBias)]
    dense = [b.values for b in call.bias if isinstance(b, DenseBias)] + [_written_out(t) for t in tables[1:]]
    values = dense[0] if dense else None
    for more in dense[1:]:
        values = more.float() if values is None else values.float() + more.float()
    table = None
    if tables:
        t = tables[0]
        stride = t.table.shape[1] if t.table.shape[0] > 1 else 0
        table = (t.table.contiguous(), stride, t.table.shape[1], t.q_code.contiguous(), t.k_code.contiguous())
    segments = None
    if call.segments is not None:
        mine, theirs = (s.contiguous() for s in call.segments)
        segments = (mine, theirs, mine.shape[1], theirs.shape[1])
    return (
        float(call.scale),
        None if call.softcap is None else float(call.softcap),
        None if values is None else (values, *values.expand(shape).stride()),
        table,
        segments,
    )


def _written_out(bias: TableBias) -> Tensor:
    """A table as a dense bias, [1, H|1, Nq, Nk]."""
    place = bias.k_code[None, :] - bias.q_code[:, None]
    inside = (place >= 0) & (place < bias.table.shape[1])
    return torch.where(inside, bias.table[:, torch.where(inside, place, 0)], 0)[None]


def _start(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """All programs lie on the first axis of the grid, which counts to 2^31."""
    kernel[(programs,)](*args, **constants)


def _listed(plan: PlanTensors) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (
        (plan.full_count, plan.full_index, plan.full_index.shape[-1]),
        (plan.part_count, plan.part_index, plan.part_index.shape[-1], plan.part_mask),
    )


def _strided(t: Tensor) -> tuple[Any, ...]:
    return (t, *t.stride())


def _row(t: Tensor, heads: int) -> tuple[Any, ...]:
    samples, own = t.shape[0], t.shape[1]
    return (t, t.stride(0) if samples > 1 else 0, t.stride(1) if own > 1 else 0, heads // own)


def _device(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
