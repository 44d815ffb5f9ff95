"""Dense attention by FlashAttention-4 (CuTe DSL, package flash-attn-4), forward and backward, with the LSE."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Sizes
from glocal.kernels.guests.fa4 import COMPUTE, PACKAGES, _by_token
from glocal.kernels.guests.present import lacking, on

CAPABILITY = Capability(
    name="fa4_dense",
    needs="nothing",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    note="dense FlashAttention-4",
    head_dims=Sizes(8, 256, multiple=8),
    value_dims=Sizes(8, 256, multiple=8),
    bias=(),
    softcap=False,
    segments=False,
    empty=False,
    sparse=False,
    deterministic=False,
    packages=PACKAGES,
    by_name_only="a guest: runs when named, or where it was measured to be fastest",
)


def missing(device: str) -> str | None:
    """What this machine lacks."""
    return lacking(PACKAGES, COMPUTE, device)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]

    with on(q):
        found = _flash_attn_fwd(*_by_token(q, k, v), softmax_scale=call.scale, return_lse=True)
    return found[0].transpose(1, 2), found[1]


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Gradients through out and LSE."""
    from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

    with on(q):
        found = _flash_attn_bwd(
            *_by_token(q, k, v, out, grad_out), lse.contiguous(), softmax_scale=call.scale, dlse=grad_lse.contiguous()
        )
    return Grads(*(t.transpose(1, 2) for t in found[:3]))
