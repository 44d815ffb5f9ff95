"""Attention with q, k (and weights, values) rounded to 8 bits, forward only; runs where `Score(quant=...)` asks for it.

On CUDA Triton kernels run, rounding fused with the plan's order. On the CPU, and for int4, the emulation in plain torch
runs: the definition. SageAttention (arXiv 2410.02367), PAROAttention (arXiv 2506.16054).
"""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Sizes, installed
from glocal.kernels.quantised import emulate
from glocal.kernels.quantised.work import work_of

CAPABILITY = Capability(
    name="quantised",
    needs="plan",
    devices=("cpu", "cuda"),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    note="q and k in int8 or fp8, weights and values in int8, fp8 or as they are; forward only",
    head_dims=Sizes(1, 256),
    value_dims=Sizes(1, 256),
    block_sizes=Sizes(32, 128, power=True),
    blocks=((128, 128), (64, 64)),
    bias=(),
    softcap=False,
    segments=False,
    backward=False,
    dense=False,
    quant=True,
)


def missing(device: str) -> str | None:
    """What this machine lacks."""
    if device == "cuda" and not installed("triton"):
        return "triton is not installed (pip install triton)"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))} (legal: from 8.9 on)"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    work = work_of(call, q.shape[2], k.shape[2])
    if work.k.heads not in (1, k.shape[1]):  # every query head has a key order of its own
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if q.device.type == "cpu" or work.quant.qk == "int4":
        return emulate.forward(q, k, v, call, work)
    from glocal.kernels.quantised import launch

    return launch.forward(q, k, v, call, work)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Rounding has no gradient: the record refuses calls that want one."""
    raise ValueError(f"backend={call.backend!r} has no gradients; legal: inputs without requires_grad, or no_grad().")
