"""A residual stream, a gated branch added to it and the layer norm of the sum with scale and shift, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels._launch import on_device, start
from glocal.kernels.maps import power


@triton.jit
def _of_row(table, b, n, column, real):
    """float32 [WIDE] of a row. table: (values, steps of sample and token)."""
    return tl.load(table[0] + b * table[1] + n * table[2] + column, mask=real, other=0.0).to(tl.float32)


@triton.jit
def stream_kernel(
    x, branch, gate, total, out, factor, shift, weight, bias, tokens, eps,
    C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x, branch, total, out: [B * tokens, C]; gate, factor, shift: (values, steps of sample and token); weight, bias:
    [C]. None for what is not there.
    """
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    column = tl.arange(0, WIDE)
    real = column < C
    at = row * C + column
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if branch is not None:
        more = tl.load(branch + at, mask=real, other=0.0).to(tl.float32)
        if gate is not None:
            more *= _of_row(gate, b, n, column, real)
        whole = (value + more).to(total.dtype.element_ty)
        tl.store(total + at, whole, mask=real)
        value = whole.to(tl.float32)
    if out is not None:
        away = tl.where(real, value - tl.sum(value, 0) / C, 0.0)
        found = away / tl.sqrt(tl.sum(away * away, 0) / C + eps)
        if weight is not None:
            found *= tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
            found += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
        if factor is not None:
            found *= 1.0 + _of_row(factor, b, n, column, real)
            found += _of_row(shift, b, n, column, real)
        tl.store(out + at, found.to(out.dtype.element_ty), mask=real)


def stream(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    change: tuple[Tensor, Tensor] | None,
    eps: float | None,
) -> tuple[Tensor, Tensor | None]:
    """x, branch: [B, N, C] on a GPU; gate and both of `change` broadcast to it; norm: weight and bias [C]."""
    x = x.contiguous()
    total = x if branch is None else torch.empty_like(x)
    out = None if eps is None else torch.empty_like(x)
    channels = x.shape[-1]
    wide = power(channels)
    with on_device(x):
        start(
            stream_kernel, (x.shape[0] * x.shape[1],),
            x, None if branch is None else branch.contiguous(), _rows(gate, x), total, out,
            *([_rows(t, x) for t in change] if change is not None else (None, None)),
            *(norm if norm is not None else (None, None)),
            x.shape[1], 0.0 if eps is None else eps, C=channels, WIDE=wide, num_warps=min(8, max(1, wide // 512)),
        )  # fmt: skip
    return total, out


def _rows(t: Tensor | None, x: Tensor) -> tuple[Tensor, int, int] | None:
    """Values with the steps of sample and token, 0 where all have the same."""
    if t is None:
        return None
    t = t.expand(*([-1] * (t.dim() - 1)), x.shape[-1])
    t = (t if t.stride(-1) == 1 else t.contiguous()).expand(x.shape)
    return t, t.stride(0), t.stride(1)
