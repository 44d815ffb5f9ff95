"""Depthwise convolution of channels-last maps: each program makes a run of pixels for some channels, reading neighbours
through the cache. The bias and the input itself (a residual) are added on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels._launch import on_device, start
from glocal.kernels.maps import power
from glocal.kernels.maps.affine import activated, scale_and_shift

_PIXELS, _CHANNELS = 64, 64  # of a program
_THIN = 16  # pixels at once of a program that sums up over all of them
_PROGRAMS = 1024  # that share the sums over all pixels of a gradient of weights


@triton.jit
def _place(pixel, columns, rows):
    """Column, row and image (int64) of pixels; numbers of pixels fit into 32 bits, where dividing is cheap."""
    line = pixel // columns
    return pixel % columns, line % rows, (line // rows).to(tl.int64)


@triton.jit
def forward_kernel(
    x, weight, bias, out, stats, height, width, rows, columns, total, top, left, eps,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
    LINES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """x: [B, height, width, C], weight: [C, K, K], out: [B, rows, columns, C], total: B * rows * columns.

    LINES: of the K lines of taps that are unrolled.

    top, left: padding. RESIDUAL: x is added, for equal sizes. stats: mean, variance, weight, bias [C] of a norm behind
    it, or None; ACT: an activation at the end.
    """
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live, real = pixel < total, channel < C
    column, row, image = _place(pixel, columns, rows)  # type: ignore[misc]
    found = tl.zeros([P, CHANNELS], tl.float32)
    if BIAS:
        found += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    for line in tl.range(0, K, LINES, num_stages=1):
        for n in tl.static_range(LINES * K):  # type: ignore[attr-defined]
            y, z = row * STRIDE + line + n // K - top, column * STRIDE + n % K - left
            inside = live & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            at = ((image * height + y) * width + z) * C
            value = tl.load(x + at[:, None] + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0)
            w = tl.load(weight + channel * (K * K) + line * K + n, mask=real, other=0.0).to(tl.float32)
            found += value.to(tl.float32) * w[None, :]
    at = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    written = live[:, None] & real[None, :]
    if RESIDUAL:
        found += tl.load(x + at, mask=written, other=0.0).to(tl.float32)
    if stats is not None:
        factor, shift = scale_and_shift(stats[0], stats[1], stats[2], stats[3], channel, real, eps)
        found = found.to(out.dtype.element_ty).to(tl.float32) * factor[None, :] + shift[None, :]
    tl.store(out + at, activated(found, ACT).to(out.dtype.element_ty), mask=written)


@triton.jit
def input_kernel(
    grad, weight, grad_x, height, width, rows, columns, total, top, left,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
    LINES: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """grad: [B, rows, columns, C] -> grad_x: [B, height, width, C]; total: B * height * width."""
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live, real = pixel < total, channel < C
    column, row, image = _place(pixel, width, height)  # type: ignore[misc]
    found = tl.zeros([P, CHANNELS], tl.float32)
    for line in tl.range(0, K, LINES, num_stages=1):
        for n in tl.static_range(LINES * K):  # type: ignore[attr-defined]
            y, z = row + top - line - n // K, column + left - n % K
            inside = live & (y >= 0) & (z >= 0)
            if STRIDE > 1:
                inside = inside & (y % STRIDE == 0) & (z % STRIDE == 0)
                y, z = y // STRIDE, z // STRIDE
            inside = inside & (y < rows) & (z < columns)
            at = ((image * rows + y) * columns + z) * C
            value = tl.load(grad + at[:, None] + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0)
            w = tl.load(weight + channel * (K * K) + line * K + n, mask=real, other=0.0).to(tl.float32)
            found += value.to(tl.float32) * w[None, :]
    at = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    written = live[:, None] & real[None, :]
    if RESIDUAL:
        found += tl.load(grad + at, mask=written, other=0.0).to(tl.float32)
    tl.store(grad_x + at, found.to(grad_x.dtype.element_ty), mask=written)


@triton.jit
def weight_kernel(
    grad, x, sums, height, width, rows, columns, total, top, left,
    C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, P: tl.constexpr,
    CHANNELS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """sums: float32 [programs, TAPS, C]: products of grad with x at every tap, and the sum of grad behind the taps.

    A program takes LINES of the K lines of taps, each of its threads the same channels of every pixel.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < C
    line = tl.program_id(2) * LINES
    none = tl.zeros([P, CHANNELS], tl.float32)
    found, level = (none,) * (LINES * K), none
    for first in range(tl.program_id(0) * P, total, tl.num_programs(0) * P):
        pixel = first + tl.arange(0, P)
        live = pixel < total
        column, row, image = _place(pixel, columns, rows)  # type: ignore[misc]
        at = pixel.to(tl.int64)[:, None] * C + channel[None, :]
        g = tl.load(grad + at, mask=live[:, None] & real[None, :], other=0.0).to(tl.float32)
        level += g
        for n in tl.static_range(LINES * K):  # type: ignore[attr-defined]
            y, z = row * STRIDE + line + n // K - top, column * STRIDE + n % K - left
            inside = live & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            place = ((image * height + y) * width + z) * C
            value = tl.load(x + place[:, None] + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0)
            found = found[:n] + (found[n] + g * value.to(tl.float32),) + found[n + 1 :]
    base = sums + tl.program_id(0).to(tl.int64) * TAPS * C + channel
    for n in tl.static_range(LINES * K):  # type: ignore[attr-defined]
        tl.store(base + (line * K + n) * C, tl.sum(found[n], 0), mask=real)
    if line == 0:
        tl.store(base + K * K * C, tl.sum(level, 0), mask=real)


@dataclass(frozen=True)
class Shape:
    """stride; padding at the top and the left; rows and columns of the result; residual: the input is added."""

    stride: int
    top: int
    left: int
    rows: int
    columns: int
    residual: bool = False


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    norm: tuple[tuple[Tensor, Tensor, Tensor, Tensor], float] | None = None,
    act: str = "none",
) -> Tensor:
    """x, weight: contiguous, as in `Depthwise`; norm: ((mean, variance, weight, bias), eps) of a norm behind it."""
    b, height, width, channels = x.shape
    out = x.new_empty(b, shape.rows, shape.columns, channels)
    total, sizes = b * shape.rows * shape.columns, _sizes(weight, shape)
    stats, eps = (None, 0.0) if norm is None else norm
    with on_device(x):
        start(forward_kernel, _grid(total, sizes),
            x, weight, weight if bias is None else bias, out, stats, height, width, shape.rows, shape.columns, total,
            shape.top, shape.left, eps, BIAS=bias is not None, RESIDUAL=shape.residual, ACT=act, **sizes,
        )  # fmt: skip
    return out


class Depthwise(torch.autograd.Function):
    """x: [B, H, W, C] contiguous on a GPU, weight: [C, 1, K, K], bias: [C] or None, of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
        """The convolution, [B, rows, columns, C]."""
        x, weight = x.contiguous(), weight.contiguous()
        out = forward(x, weight, bias, shape)
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.biased = shape, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        grad, shape = grads[0].contiguous(), ctx.shape
        b, height, width, channels = x.shape
        kernel, total = weight.shape[-1], b * shape.rows * shape.columns
        numbers = (height, width, shape.rows, shape.columns)
        grad_x = grad_w = grad_b = None
        sizes = _sizes(weight, shape)
        with on_device(x):
            if ctx.needs_input_grad[0]:
                grad_x = torch.empty_like(x)
                pixels = b * height * width
                start(
                    input_kernel,
                    _grid(pixels, sizes),
                    grad,
                    weight,
                    grad_x,
                    *numbers,
                    pixels,
                    shape.top,
                    shape.left,
                    RESIDUAL=shape.residual,
                    **sizes,
                )
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                taps, lines = kernel**2 + 1, sizes["LINES"]
                sizes["P"] = _THIN
                blocks = -(-channels // sizes["CHANNELS"])
                programs = max(1, min(_PROGRAMS * lines // (blocks * kernel), -(-total // sizes["P"])))
                sums = x.new_empty(programs, taps, channels, dtype=torch.float32)
                start(
                    weight_kernel,
                    (programs, blocks, kernel // lines),
                    grad,
                    x,
                    sums,
                    *numbers,
                    total,
                    shape.top,
                    shape.left,
                    TAPS=taps,
                    **sizes,
                )
                found = sums.sum(0).to(weight.dtype)  # [taps, C]
                grad_w = found[: kernel**2].T.reshape(weight.shape)
                grad_b = found[kernel**2] if ctx.biased else None
        return grad_x, grad_w, grad_b, None


def _sizes(weight: Tensor, shape: Shape) -> dict[str, int]:
    channels = weight.shape[0]
    side = min(_CHANNELS, max(16, power(channels)))
    if channels % side and channels % 32 == 0:
        side = 32
    kernel = weight.shape[-1]
    return {
        "C": channels,
        "K": kernel,
        "LINES": kernel if kernel <= 3 else 1,
        "STRIDE": shape.stride,
        "P": _PIXELS,
        "CHANNELS": side,
        "num_warps": 4,
    }


def _grid(pixels: int, sizes: dict[str, int]) -> tuple[int, int]:
    return -(-pixels // sizes["P"]), -(-sizes["C"] // sizes["CHANNELS"])
