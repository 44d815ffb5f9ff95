"""Block-sparse attention in Triton, forward and backward from a block plan. Not yet measured on a GPU.

Every kernel is proven against the definition under Triton's interpreter on the CPU; no GPU has run them, so "auto"
passes this backend over and it runs when named. Triton is imported on the first call.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Sizes

CAPABILITY = Capability(
    name="triton",
    needs="plan",
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    note="own Triton kernels, forward and backward; bias gradients in plain torch; not yet measured on a GPU",
    head_dims=Sizes(1, 256),
    value_dims=Sizes(1, 256),
    block_sizes=Sizes(16, 128, power=True),
    blocks=((128, 128), (64, 64)),
    dense=False,
    by_name_only="not yet measured on a GPU, runs when named",
)


def missing(device: str) -> str | None:
    """What this machine lacks."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
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
