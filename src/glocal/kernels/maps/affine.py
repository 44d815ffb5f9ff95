"""Batch norm by stored statistics (arXiv 1502.03167) and its activation, one pass over a channels-last map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels._launch import on_device, start

_ENTRIES = 4096  # of a program


@triton.jit
def activated(x, ACT: tl.constexpr):
    """x, gelu(x) by the error function, or its tanh form."""
    if ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def scale_and_shift(mean, variance, weight, bias, channel, real, eps):
    """float32 factors and summands of channels."""
    factor = 1.0 / tl.sqrt(tl.load(variance + channel, mask=real, other=1.0).to(tl.float32) + eps)
    factor *= tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    return factor, shift - tl.load(mean + channel, mask=real, other=0.0).to(tl.float32) * factor


@triton.jit
def affine_kernel(
    x, out, mean, variance, weight, bias, total, eps, C: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr
):
    """x, out: contiguous, C channels last, `total` entries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    channel = (at % C).to(tl.int32)
    factor, shift = scale_and_shift(mean, variance, weight, bias, channel, live, eps)  # type: ignore[misc]
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32) * factor + shift
    tl.store(out + at, activated(value, ACT).to(out.dtype.element_ty), mask=live)


def affine(x: Tensor, stats: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, act: str) -> Tensor:
    """x: [..., C] on a GPU; stats: mean, variance, weight, bias [C] -> the normalised and activated map, contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    with on_device(x):
        grid = (-(-x.numel() // _ENTRIES),)
        start(affine_kernel, grid, x, out, *stats, x.numel(), eps, C=x.shape[-1], BLOCK=_ENTRIES, ACT=act, num_warps=8)
    return out
