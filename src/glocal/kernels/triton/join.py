"""Two partial softmaxes over disjoint keys as one, in one pass over their rows; `guests.join` is the definition."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels.triton.defaults import ROWS, padded
from glocal.kernels.triton.tile import INF


@triton.jit
def join_kernel(a, end_a, b, end_b, out, lse, rows, DV: tl.constexpr, WDV: tl.constexpr, BN: tl.constexpr):
    """a, b, out [rows, DV]; ends and lse float32 [rows]. One program for BN rows."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < rows
    column = tl.arange(0, WDV)
    one = tl.load(end_a + row, mask=inside, other=-INF)
    two = tl.load(end_b + row, mask=inside, other=-INF)
    top = tl.where(one >= two, one, two)  # NaN wins
    shift = tl.where(top == -INF, 0.0, top)
    wa, wb = tl.exp(one - shift), tl.exp(two - shift)
    total = wa + wb
    scale = 1.0 / tl.where(total == 0, 1.0, total)
    place = row[:, None] * DV + column[None, :]
    live = inside[:, None] & (column < DV)[None, :]
    left = tl.load(a + place, mask=live, other=0.0).to(tl.float32) * (wa * scale)[:, None]
    right = tl.load(b + place, mask=live, other=0.0).to(tl.float32) * (wb * scale)[:, None]
    tl.store(out + place, (left + right).to(out.dtype.element_ty), mask=live)
    tl.store(lse + row, top + tl.log(total), mask=inside)


def join(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """a, b: contiguous [B, H, N, Dv]; LSE contiguous [B, H, N]."""
    out, lse = torch.empty_like(a), torch.empty_like(lse_a)
    rows, size = lse.numel(), a.shape[-1]
    where: Any = torch.cuda.device(a.device) if a.is_cuda else nullcontext()
    kernel: Any = join_kernel
    if rows and size:
        with where:
            kernel[(-(-rows // ROWS),)](a, lse_a, b, lse_b, out, lse, rows, DV=size, WDV=padded(size), BN=ROWS)
    return out, lse
