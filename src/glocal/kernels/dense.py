"""Dense attention by the best kernel of the installed torch that also gives the LSE.

CPU: torch's flash attention for CPUs, low precision computed in float32. CUDA: cuDNN, FlashAttention or our own tiles
(`_dense_cuda.py`). What none of them takes is computed in pieces of queries against all keys, never holding all pairs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.kernels import _blockwise, _dense_cuda
from glocal.kernels._jobs import Limits
from glocal.kernels.call import Call, DenseBias, Grads, PlanTensors
from glocal.kernels.capability import ALL_DTYPES, Capability

CAPABILITY = Capability(
    name="dense",
    needs="nothing",
    devices=("cpu", "cuda"),
    dtypes=ALL_DTYPES,
    note="fastest fused dense attention of torch with LSE (cuDNN, FlashAttention, CPU flash), own tiles for the rest",
    sparse=False,
    deterministic=False,  # unless torch asks for it: cuDNN's gradients of queries are else summed as they come
    graphs=True,
)

_PIECES = Limits(keys=1 << 14, scores=1 << 22)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    call = _masked(q, call)
    if q.device.type == "cuda":
        chosen = _dense_cuda.engine(q, k, v, call)
        if chosen is not None:
            return _dense_cuda.forward(q, k, v, call, chosen)
    if not _plain(q, k, v, call):
        return _blockwise.forward(q, k, v, _in_pieces(q, k, call), _PIECES)
    groups = q.shape[1] // k.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_folded(q, k, v, groups), scale=call.scale)
    return _unfold(out, groups)[..., : v.shape[3]].to(q.dtype), _unfold(lse[..., None], groups)[..., 0]


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Gradients through out and LSE."""
    biases, call = len(call.bias), _masked(q, call)
    grads = _backward(grad_out, grad_lse, q, k, v, out, lse, call)
    return replace(grads, bias=grads.bias[:biases])


def _backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    if q.device.type == "cuda":
        grads = _dense_cuda.backward(grad_out, grad_lse, q, k, v, out, lse, call)
        if grads is not None:
            return grads
    if not _plain(q, k, v, call) or (call.lse_grad and bool((grad_lse != 0).any())):
        return _blockwise.backward(grad_out, grad_lse, q, k, v, out, lse, _in_pieces(q, k, call), _PIECES)
    groups = q.shape[1] // k.shape[1]
    ready = _folded(q, k, v, groups)
    size = ready[2].shape[3]
    grad, result = (_fold(pad(t, (0, size - t.shape[3])), groups).to(ready[0].dtype) for t in (grad_out, out))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *ready, result, _fold(lse[..., None], groups)[..., 0], 0.0, False, scale=call.scale
    )
    grad_q = _unfold(found[0], groups)[..., : q.shape[3]]
    return Grads(grad_q.to(q.dtype), found[1][..., : k.shape[3]].to(k.dtype), found[2][..., : v.shape[3]].to(v.dtype))


def _masked(q: Tensor, call: Call) -> Call:
    """Counts of a pattern as a bias, log of how often a pair counts; the last bias of the call."""
    if call.counts is None:
        return call
    counts = call.counts
    if counts.shape[1] not in (1, q.shape[1]):
        counts = counts.repeat_interleave(q.shape[1] // counts.shape[1], 1)
    mask = DenseBias(counts.to(torch.float64 if q.dtype == torch.float64 else torch.float32).log())
    return replace(call, counts=None, bias=(*call.bias, mask), bias_grad=call.bias_grad and bool(call.bias))


def _plain(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether the fused kernel of CPUs takes the call."""
    if call.bias or call.segments is not None or call.softcap is not None or q.device.type != "cpu":
        return False
    return 0 not in (*q.shape, *k.shape, *v.shape)


def _fold(t: Tensor, groups: int) -> Tensor:
    """Query heads of one key head as one longer row axis, [B, Hkv * groups, N, D] -> [B, Hkv, groups * N, D]."""
    return t if groups == 1 else t.unflatten(1, (-1, groups)).flatten(2, 3)


def _unfold(t: Tensor, groups: int) -> Tensor:
    return t if groups == 1 else t.unflatten(2, (groups, -1)).flatten(1, 2)


def _folded(q: Tensor, k: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for the kernel of CPUs: equal head sizes and float32 or float64."""
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    size = max(q.shape[3], v.shape[3])
    q, k, v = (pad(t, (0, size - t.shape[3])) if t.shape[3] < size else t for t in (q, k, v))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _fold(q, groups).to(high), k.to(high), v.to(high)


def _in_pieces(q: Tensor, k: Tensor, call: Call) -> Call:
    """The call with a plan of whole lists: each piece of queries sees one block of all keys."""
    nq, nk, where = q.shape[2], k.shape[2], {"dtype": torch.int32, "device": q.device}
    piece = max(1, min(512, nq, (1 << 22) // max(1, nk)))
    rows = -(-nq // piece)
    order = torch.arange(rows * piece, **where)
    none = torch.zeros(1, rows, 0, **where)
    plan = PlanTensors(
        q_order=torch.where(order < nq, order, -1)[None, None],
        kv_order=torch.arange(nk, **where)[None, None],
        full_count=torch.full((1, rows), int(nk > 0), **where),
        full_index=torch.zeros(1, rows, 1, **where),
        part_count=torch.zeros(1, rows, **where),
        part_index=none,
        part_mask=none,
        masks=torch.zeros(0, piece, -(-max(1, nk) // 32), **where),
        owner=torch.zeros(1, 1, **where),
    )
    return Call(
        backend=call.backend,
        scale=call.scale,
        softcap=call.softcap,
        q_block=piece,
        kv_block=max(1, nk),
        plan=plan,
        bias=call.bias,
        segments=call.segments,
    )
