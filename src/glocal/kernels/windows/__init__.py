"""Attention inside small windows: everything a tile of queries sees is read once and kept in one program.

Neighbourhoods and windows of vision backbones (arXiv 2204.07143, 2103.14030, 2204.01697): up to a few hundred keys a
tile. What depends on positions alone (offsets, masks, biases) is made once and serves all images of a batch. Plans come
from `glocal.plan.windows`. Triton, and Gluon inside it, are imported on the first call.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Sizes, installed

CAPABILITY = Capability(
    name="windows",
    needs="windows",
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    note="own Triton kernels for small windows with table gradients, no atomics",
    head_dims=Sizes(1, 128),
    value_dims=Sizes(1, 128),
    block_sizes=Sizes(16, 64, power=True),
    bias=("table",),
    softcap=False,
    segments=False,
    dense=False,
    most_keys=512,
)


def missing(device: str) -> str | None:
    """What this machine lacks."""
    if not installed("triton"):
        return "triton is not installed (pip install triton)"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    from glocal.kernels.windows import launch

    q, call, _ = _upward(q, call)
    return launch.forward(q, k, v, call)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Gradients through out and LSE; equal bits from call to call."""
    from glocal.kernels.windows import launch

    q, call, sign = _upward(q, call)
    found = launch.backward(launch.Known(grad_out, grad_lse, out, lse), q, k, v, call)
    return found if sign > 0 else replace(found, q=found.q * sign)


def _upward(q: Tensor, call: Call) -> tuple[Tensor, Call, int]:
    """The same attention by a scale above 0, since kernels take the largest logit of a row before they scale, and what
    its gradient of q is to be multiplied with.
    """
    if call.scale > 0:
        return q, call, 1
    if call.scale < 0:
        return -q, replace(call, scale=-call.scale), -1
    return torch.zeros_like(q), replace(call, scale=1.0), 0
