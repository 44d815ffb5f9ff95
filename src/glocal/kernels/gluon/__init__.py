"""Block-sparse attention for Hopper in Gluon: TMA, wgmma and warp groups with roles of their own, from a block plan.

Gluon ships inside Triton, so nothing beyond torch's own Triton is needed. Both are imported on the first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Sizes, installed

CAPABILITY = Capability(
    name="gluon",
    needs="plan",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    note="own Gluon kernels for Hopper: TMA and wgmma, full blocks without masks; backward of wide heads in Triton",
    head_dims=Sizes(16, 256, multiple=8),
    value_dims=Sizes(16, 256, multiple=8),
    block_sizes=Sizes(64, 128, power=True),
    blocks=((128, 128), (64, 64)),
    bias=(),
    segments=False,
    deterministic=False,  # unless torch asks for it: gradients of queries are else summed as they come
    dense=False,
    by_name_only="runs when named until the table of measured times lists it",
)


def missing(device: str) -> str | None:
    """What this machine lacks."""
    if not installed("triton") or not installed("triton.experimental.gluon"):
        return "Triton with Gluon is not installed (pip install 'triton>=3.6')"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        found = "sm_{}{}".format(*torch.cuda.get_device_capability())
        return f"the card is {found} (legal: Hopper, sm_90)"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    from glocal.kernels.gluon import launch

    return launch.forward(q, k, v, call)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Gradients through out and LSE; equal bits from call to call where torch asks for deterministic algorithms."""
    from glocal.kernels.gluon import launch_backward
    from glocal.kernels.triton.launch import Known

    return launch_backward.backward(Known(grad_out, grad_lse, out, lse), q, k, v, call)
