"""Depthwise convolution of channels-last maps with kernels of each sample: one pass over the values where a projection
left them, in place of one for every tap.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels._launch import on_device, start
from glocal.kernels.maps import power

_PIXELS, _CHANNELS = 64, 64  # of a program
_THIN = 16  # pixels at once of a program that sums up over many of them
_PROGRAMS = 4096  # that share the sums over all pixels of a gradient of kernels


@triton.jit
def forward_kernel(
    x, kernels, out, height, width, tiles, x_image, x_pixel,
    C: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, FLIP: tl.constexpr, P: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """x: [B, height * width, C] by strides, kernels: [B, C, DOWN, ACROSS], out: [B, height * width, C].

    tiles: of P pixels an image. FLIP: taps in reverse order, for the gradient of x.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * P + tl.arange(0, P)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live, real = pixel < height * width, channel < C
    row, column = pixel // width, pixel % width
    taps: tl.constexpr = DOWN * ACROSS
    found = tl.zeros([P, CHANNELS], tl.float32)
    for i in tl.static_range(DOWN):  # type: ignore[attr-defined]
        for j in tl.static_range(ACROSS):  # type: ignore[attr-defined]
            y, z = row + i - DOWN // 2, column + j - ACROSS // 2
            inside = live & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            at = image * x_image + (y * width + z).to(tl.int64) * x_pixel
            value = tl.load(x + at[:, None] + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0)
            tap = i * ACROSS + j
            if FLIP:
                tap = taps - 1 - tap
            w = tl.load(kernels + (image * C + channel) * taps + tap, mask=real, other=0.0).to(tl.float32)
            found += value.to(tl.float32) * w[None, :]
    at = (image * (height * width) + pixel)[:, None] * C + channel[None, :]
    tl.store(out + at, found.to(out.dtype.element_ty), mask=live[:, None] & real[None, :])


@triton.jit
def kernels_kernel(
    grad, x, sums, height, width, parts, per, x_image, x_pixel,
    C: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad: [B, height * width, C], x by strides; sums: float32 [B, parts, DOWN, ACROSS, C], products of grad with x.

    per: pixels of a part. A program takes one line of taps.
    """
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real, total, line = channel < C, height * width, tl.program_id(2)
    found = (tl.zeros([P, CHANNELS], tl.float32),) * ACROSS
    for first in range(part * per, tl.minimum(part * per + per, total), P):
        pixel = first + tl.arange(0, P)
        live = pixel < total
        row, column = pixel // width, pixel % width
        at = (image * total + pixel)[:, None] * C + channel[None, :]
        g = tl.load(grad + at, mask=live[:, None] & real[None, :], other=0.0).to(tl.float32)
        for j in tl.static_range(ACROSS):  # type: ignore[attr-defined]
            y, z = row + line - DOWN // 2, column + j - ACROSS // 2
            inside = live & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            where = image * x_image + (y * width + z).to(tl.int64) * x_pixel
            value = tl.load(x + where[:, None] + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0)
            found = found[:j] + (found[j] + g * value.to(tl.float32),) + found[j + 1 :]
    base = sums + (tl.program_id(0).to(tl.int64) * DOWN + line) * ACROSS * C + channel
    for j in tl.static_range(ACROSS):  # type: ignore[attr-defined]
        tl.store(base + j * C, tl.sum(found[j], 0), mask=real)


def forward(x: Tensor, kernels: Tensor, flip: bool = False) -> Tensor:
    """x: [B, H, W, C], kernels: [B, C, h, w] with odd sides -> [B, H, W, C] contiguous; flip: taps in reverse order."""
    b, height, width, channels = x.shape
    x, kernels = _rows(x), kernels.contiguous()
    out = x.new_empty(b, height, width, channels)
    sizes = _sizes(kernels)
    tiles = -(-height * width // sizes["P"])
    with on_device(x):
        start(
            forward_kernel, (b * tiles, -(-channels // sizes["CHANNELS"])),
            x, kernels, out, height, width, tiles, x.stride(0), x.stride(2), FLIP=flip, **sizes,
        )  # fmt: skip
    return out


class DynamicConv(torch.autograd.Function):
    """x: [B, H, W, C] on a GPU, kernels: [B, C, h, w] of its dtype, odd sides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor) -> Tensor:
        """As `forward`."""
        ctx.save_for_backward(x, kernels)
        return forward(x, kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and of the kernels; equal bits from call to call."""
        x, kernels = ctx.saved_tensors
        grad = grads[0].contiguous()
        b, height, width, channels = x.shape
        grad_x = forward(grad, kernels, flip=True) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        x, sizes = _rows(x), _sizes(kernels) | {"P": _THIN}
        blocks, tiles = -(-channels // sizes["CHANNELS"]), -(-height * width // sizes["P"])
        down, across = kernels.shape[2:]
        per = -(-tiles // max(1, min(_PROGRAMS // (blocks * b * down), tiles)))  # tiles of a part
        parts = -(-tiles // per)
        sums = x.new_empty(b, parts, down, across, channels, dtype=torch.float32)
        with on_device(x):
            start(
                kernels_kernel, (b * parts, blocks, down),
                grad, x, sums, height, width, parts, per * sizes["P"], x.stride(0), x.stride(2), **sizes,
            )  # fmt: skip
        return grad_x, sums.sum(1).permute(0, 3, 1, 2).to(kernels.dtype)


def _rows(x: Tensor) -> Tensor:
    """x with channels side by side and pixels at one distance, as the kernels read it."""
    return x if x.stride(3) == 1 and x.stride(1) == x.shape[2] * x.stride(2) else x.contiguous()


def _sizes(kernels: Tensor) -> dict[str, int]:
    channels, down, across = kernels.shape[1:]
    side = min(_CHANNELS, max(16, power(channels)))
    if channels % side and channels % 32 == 0:
        side = 32
    return {"C": channels, "DOWN": down, "ACROSS": across, "P": _PIXELS, "CHANNELS": side, "num_warps": 4}
