"""Full blocks on a guest, everything else on ours, joined by log-sum-exp: exact in forward and backward.

Backward needs no join: with the LSE and delta of the whole row, each side's dS = P (dP - delta + dLSE) is its own share
of the gradient, and the shares add up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from glocal.kernels import cpu, gluon, triton
from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Request, refusals
from glocal.kernels.guests.join import join
from glocal.kernels.guests.prepare import Prepared, prepare

# LSE given to a guest for rows without keys and for pads: exp(logit - _FAR) is 0, and no infinity meets another.
_FAR = 1e30


@dataclass(frozen=True, eq=False)
class Rows:
    """What backward reads of each query slot: gradients [B, H, n, Dv] and [B, H, n], out and LSE of the whole row."""

    grad_out: Tensor
    grad_lse: Tensor
    out: Tensor
    lse: Tensor


class Guest(Protocol):
    """The kernels of a guest on tokens in plan order, [B, H, slots, D]."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Prepared, scale: float) -> tuple[Tensor, Tensor]:
        """out and natural-log LSE over the listed blocks; rows without a block may hold anything."""
        ...

    def backward(self, rows: Rows, qkv: tuple[Tensor, ...], plan: Prepared, scale: float) -> tuple[Tensor, ...]:
        """Gradients of q, k, v through the listed blocks."""
        ...


def forward(guest: Guest, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    made = prepare(call, q.shape[2], k.shape[2], guest.name)
    found = None
    if made.some:
        out, lse = guest.forward(*_ordered(made, q, k, v), made, call.scale)
        if made.empty is not None:
            none = made.empty.repeat_interleave(call.q_block, 2)[..., : lse.shape[2]]
            none = _by_head(none, lse.shape[1])
            out, lse = out.masked_fill(none[..., None], 0), lse.masked_fill(none, -torch.inf)
        side = _for_heads(made, q.shape[1])
        found = side.returned(out), side.returned(lse, -torch.inf)
    if made.rest is not None:
        left = _ours(q, v, call).forward(q, k, v, replace(call, plan=made.rest))
        found = left if found is None else join(*found, *left)
    if found is None:
        rows = q.shape[:3]
        return q.new_zeros(*rows, v.shape[3]), q.new_full(rows, -torch.inf, dtype=torch.float32)
    return found


def backward(guest: Guest, rows: Rows, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Grads:
    """Gradients through out and LSE. rows: by token."""
    made = prepare(call, q.shape[2], k.shape[2], guest.name)
    found = None
    if made.some:
        side, empty = _for_heads(made, q.shape[1]), rows.lse == -torch.inf
        given = Rows(
            side.ordered(rows.grad_out).contiguous(),
            side.ordered(rows.grad_lse.float().masked_fill(empty, 0)).contiguous(),
            side.ordered(rows.out).contiguous(),
            side.ordered(rows.lse.float().masked_fill(empty, _FAR), _FAR).contiguous(),
        )
        to_q, to_k, to_v = guest.backward(given, _ordered(made, q, k, v), made, call.scale)
        to_k, to_v = (_folded(made.k.summed(t), n.shape[1]) for t, n in ((to_k, k), (to_v, v)))
        found = Grads(side.returned(to_q), to_k, to_v)
    if made.rest is not None:
        left = _ours(q, v, call).backward(
            rows.grad_out, rows.grad_lse, q, k, v, rows.out, rows.lse, replace(call, plan=made.rest)
        )
        found = left if found is None else Grads(found.q + left.q, found.k + left.k, found.v + left.v)
    if found is None:
        return Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    return found


def _ours(q: Tensor, v: Tensor, call: Call) -> ModuleType:
    """Our own kernels for what is left: the fastest of the device that takes it."""
    if not q.is_cuda:
        return cpu
    b, h, n, d = q.shape
    request = Request(q.device.type, q.dtype, b, h, v.shape[1], n, v.shape[2], d, v.shape[3])
    fits = gluon.missing("cuda") is None and not refusals(gluon.CAPABILITY, request, (call.q_block, call.kv_block))
    return gluon if fits else triton


def _ordered(made: Prepared, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in plan order; keys by query head where every query head has a key order of its own."""
    if made.k.heads not in (1, k.shape[1]):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return _for_heads(made, q.shape[1]).ordered(q), made.k.ordered(k), made.k.ordered(v)


def _for_heads(made: Prepared, heads: int):
    """The query side with an order for every query head, where key heads have orders of their own."""
    side = made.q
    if side.tokens is None or side.heads in (1, heads):
        return side
    return replace(side, tokens=side.tokens.repeat_interleave(heads // side.heads, 1))


def _by_head(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[1] in (1, heads) else t.repeat_interleave(heads // t.shape[1], 1)


def _folded(t: Tensor, heads: int) -> Tensor:
    """Gradients by query head summed over the heads of a key head."""
    if t.shape[1] == heads:
        return t
    return t.unflatten(1, (heads, -1)).sum(2)
