"""Block-sparse attention in Triton, forward and backward from a block plan, for every card and every bias.

The same kernels run under Triton's interpreter on the CPU, where they are examined. Triton is imported on first use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Sizes, installed

CAPABILITY = Capability(
    name="triton",
    needs="plan",
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    note="own Triton kernels, forward and backward; gradients of biases by pair are added up in no fixed order",
    head_dims=Sizes(1, 256),
    value_dims=Sizes(1, 256),
    block_sizes=Sizes(16, multiple=16),
    blocks=((128, 128), (64, 64)),
    dense=False,
    graphs=True,
)


def missing(device: str) -> str | None:
    """What this machine lacks."""
    if not installed("triton"):
        return "triton is not installed (pip install triton)"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        return "the card is older than compute capability 8.0"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    from glocal.kernels.triton import launch

    return launch.forward(q, k, v, call)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Gradients through out and LSE; equal bits from call to call."""
    from glocal.kernels.triton import launch

    return launch.backward(launch.Known(grad_out, grad_lse, out, lse), q, k, v, call)
