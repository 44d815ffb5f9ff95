"""Dense attention on CUDA: the fastest of what torch brings for the card, and our own tiles for what those refuse.

Engines: "cudnn" on Hopper and Blackwell, "flash" (FlashAttention-2) elsewhere; "tiles", the Triton kernels over a plan
that sees everything, for biases, soft-cap, documents, unequal head sizes, float32 and gradients of the LSE, which the
other two cannot carry through. None of them holds all pairs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from glocal._kept import ordinary
from glocal.kernels.call import Call, Grads, PlanTensors
from glocal.kernels.capability import installed
from glocal.plan.blockplan import BlockLists, pack
from glocal.plan.facts import OrderFacts, declare_order, declare_sound

Engine = Literal["cudnn", "flash", "tiles"]
_ATEN = torch.ops.aten
_BLOCK = 128
_GRID = 65_535  # the end of the grid axes on which both count samples and heads, cuDNN their product


def engine(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Engine | None:
    """Which one takes the call; None if none does."""
    if 0 in (*q.shape, *k.shape, *v.shape):
        return None
    bare = not (call.bias or call.segments is not None or call.softcap is not None)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if bare and half and q.shape[3] == v.shape[3] and q.shape[3] % 8 == 0 and q.shape[3] <= 256 and call.scale > 0:
        if q.shape[0] * q.shape[1] <= _GRID and q.shape[3] <= 128 and _cudnn(q.device.index):
            return "cudnn"
        if max(q.shape[:2]) <= _GRID:
            return "flash"
    own = q.dtype != torch.float64 and max(q.shape[3], v.shape[3]) <= 256 and _triton()
    return "tiles" if own else None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, chosen: Engine) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Nq, Dv] and natural LSE [B, Hq, Nq]."""
    if chosen == "tiles":
        from glocal.kernels.triton import launch

        return launch.forward(q, k, v, _planned(q, k, call))
    q, k, v = (_packed(t) for t in (q, k, v))
    if chosen == "cudnn":
        found = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=call.scale)
        return found[0], found[1].reshape(q.shape[:3])
    found = _ATEN._scaled_dot_product_flash_attention(q, k, v, scale=call.scale)
    return found[0], found[1]


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads | None:
    """Gradients through out and LSE; None if no engine takes the call."""
    chosen = engine(q, k, v, call)
    if chosen == "cudnn" and torch.are_deterministic_algorithms_enabled():  # cuDNN adds up in the order of arrival
        chosen = "flash"
    if chosen in ("cudnn", "flash") and call.lse_grad:
        chosen = "tiles" if _triton() else None
    if chosen is None:
        return None
    if chosen == "tiles":
        from glocal.kernels.triton import launch

        return launch.backward(launch.Known(grad_out, grad_lse, out, lse), q, k, v, _planned(q, k, call))
    grad_out, q, k, v = (_packed(t) for t in (grad_out, q, k, v))
    n, m = q.shape[2], k.shape[2]
    if chosen == "cudnn":
        seed, offset = (torch.zeros((), dtype=torch.long, device=q.device) for _ in range(2))  # no dropout: not read
        found = _ATEN._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse[..., None], seed, offset, None, None, None, n, m, 0.0, False, scale=call.scale
        )
    else:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        found = _ATEN._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, n, m, 0.0, False, seed, seed[:0], scale=call.scale
        )
    return Grads(found[0], found[1], found[2])


def _packed(t: Tensor) -> Tensor:
    """A tensor whose last stride is 1 and none 0, as the fused kernels want it."""
    return t if t.stride(-1) == 1 and 0 not in t.stride() else t.contiguous()


@lru_cache(maxsize=64)
def _cudnn(device: int | None) -> bool:
    """Whether cuDNN's attention is there and the faster one: from Hopper on."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device)[0] >= 9


def _triton() -> bool:
    return installed("triton")


def _planned(q: Tensor, k: Tensor, call: Call) -> Call:
    """The call with a plan in which everybody sees everybody."""
    made = _everything(q.shape[2], k.shape[2], q.device)
    return replace(call, q_block=_BLOCK, kv_block=_BLOCK, plan=made)


@lru_cache(maxsize=16)
def _everything(nq: int, nk: int, device: torch.device) -> PlanTensors:
    """Lists of all key blocks for all query blocks; a last block that is not full is masked."""
    with ordinary():
        where = {"dtype": torch.int32, "device": device}
        rows, whole, rest = -(-nq // _BLOCK), nk // _BLOCK, nk % _BLOCK
        orders = []
        for n in (nq, nk):
            order = torch.arange(-(-n // _BLOCK) * _BLOCK, **where)
            order = torch.where(order < n, order, -1)[None, None]
            orders.append(declare_order(order, OrderFacts(True, True, True, holes=False)))
        full = torch.arange(whole, **where).expand(1, rows, whole).contiguous()
        part = torch.full((1, rows, int(rest > 0)), whole, **where)
        seen = (torch.arange(_BLOCK, device=device) < rest).expand(1, _BLOCK, _BLOCK)
        lists = BlockLists(torch.full((1, rows), whole, **where), full)
        partial = BlockLists(torch.full((1, rows), int(rest > 0), **where), part, torch.zeros_like(part))
        assert partial.mask is not None
        declare_sound(lists, partial)
        return PlanTensors(
            *orders,
            full_count=lists.count,
            full_index=lists.index,
            part_count=partial.count,
            part_index=partial.index,
            part_mask=partial.mask,
            masks=pack(seen)[: int(rest > 0)],
            owner=torch.zeros(1, 1, **where),
        )
