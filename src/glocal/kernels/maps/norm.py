"""Layer norm over the last axis, several rows a program: rows of 96 channels leave most of one program idle."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels._launch import on_device, start
from glocal.kernels.maps import power

MOST = 8192  # channels of a row that a program holds
_ENTRIES = 4096  # of the rows of a program


@triton.jit
def forward_kernel(
    x, out, weight, bias, kept, rows, eps,
    C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """x, out: [rows, C]; weight, bias: [C]; kept: float32 [2, rows], means and rates, written if KEEP."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    real = column < C
    inside = (row < rows)[:, None] & real[None, :]
    at = row[:, None] * C + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(value, 1) / C
    away = tl.where(real[None, :], value - centre[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(away * away, 1) / C + eps)
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    found = away * factor[:, None] * w[None, :] + b[None, :]
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(kept + row, centre, mask=row < rows)
        tl.store(kept + rows + row, factor, mask=row < rows)


@triton.jit
def backward_kernel(
    grad, x, weight, kept, grad_x, sums, rows, tiles,
    C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad, x, grad_x: [rows, C]; sums: float32 [2, programs, C], gradients of weight and bias over the tiles of each.

    kept: as in `forward_kernel`.
    """
    pid = tl.program_id(0)
    column = tl.arange(0, WIDE)
    real = column < C
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    sum_w, sum_b = tl.zeros([WIDE], tl.float32), tl.zeros([WIDE], tl.float32)
    for tile in range(pid, tiles, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        live = row < rows
        inside = live[:, None] & real[None, :]
        at = row[:, None] * C + column[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(kept + row, mask=live, other=0.0)
        factor = tl.load(kept + rows + row, mask=live, other=0.0)
        normal = tl.where(real[None, :], (value - centre[:, None]) * factor[:, None], 0.0)
        weighted = g * w[None, :]
        along, level = tl.sum(weighted * normal, 1) / C, tl.sum(weighted, 1) / C
        found = (weighted - normal * along[:, None] - level[:, None]) * factor[:, None]
        tl.store(grad_x + at, found.to(grad_x.dtype.element_ty), mask=inside)
        sum_w += tl.sum(g * normal, 0)
        sum_b += tl.sum(g, 0)
    place = pid.to(tl.int64) * C + column
    tl.store(sums + place, sum_w, mask=real)
    tl.store(sums + tl.num_programs(0).to(tl.int64) * C + place, sum_b, mask=real)


def _sizes(channels: int) -> dict[str, int]:
    wide = power(channels)
    rows = max(1, _ENTRIES // wide)
    return {"C": channels, "WIDE": wide, "ROWS": rows, "num_warps": 4 if wide <= 2048 else 8}


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: bool = False) -> tuple[Tensor, Tensor]:
    """x: [..., C] contiguous -> the normalised rows, and (with `keep`) means and rates, float32 [2, rows]."""
    channels = x.shape[-1]
    rows, sizes = x.numel() // channels, _sizes(channels)
    out = torch.empty_like(x)
    kept = x.new_empty(2, rows if keep else 1, dtype=torch.float32)
    with on_device(x):
        grid = (-(-rows // sizes["ROWS"]),)
        start(forward_kernel, grid, x, out, weight, bias, kept, rows, eps, KEEP=keep, **sizes)
    return out, kept


class LayerNorm(torch.autograd.Function):
    """x: [..., C] on a GPU, weight, bias: [C] of its dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """The normalised rows, of x's shape and dtype, contiguous."""
        x, keep = x.contiguous(), any(ctx.needs_input_grad)
        out, kept = forward(x, weight, bias, eps, keep)
        if keep:
            ctx.save_for_backward(x, weight, kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        channels = x.shape[-1]
        rows, sizes = x.numel() // channels, _sizes(channels)
        tiles = -(-rows // sizes["ROWS"])
        programs = min(tiles, 1024)
        grad_x = torch.empty_like(x)
        sums = x.new_empty(2, programs, channels, dtype=torch.float32)
        with on_device(x):
            start(backward_kernel, (programs,), grad, x, weight, kept, grad_x, sums, rows, tiles, **sizes)
        grad_weight, grad_bias = sums.sum(1).to(weight.dtype).unbind()
        return grad_x, grad_weight, grad_bias, None
