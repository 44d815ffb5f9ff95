"""Two partial softmaxes over disjoint keys as one: out = (e^la a + e^lb b) / (e^la + e^lb), lse = log(e^la + e^lb)."""

from __future__ import annotations

import torch
from torch import Tensor


def join(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """a, b: [B, H, N, D], zero where their LSE [B, H, N] is -inf. One pass over the rows on CUDA."""
    if a.is_cuda:
        from glocal.kernels.triton import join as fused

        return fused.join(a.contiguous(), lse_a.contiguous(), b.contiguous(), lse_b.contiguous())
    return joined(a, lse_a, b, lse_b)


def joined(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the definition."""
    lse = torch.logaddexp(lse_a, lse_b)
    seen = torch.where(lse == -torch.inf, 0, lse)
    wa, wb = (torch.exp(t - seen)[..., None] for t in (lse_a, lse_b))
    return (wa * a.to(lse.dtype) + wb * b.to(lse.dtype)).to(a.dtype), lse
