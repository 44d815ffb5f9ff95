"""Products over all tokens, and their way back to tokens, in groups of channels: [N, d]^T [N, e] and [N, e] [e, d].

Tokens are read where a projection left them, side by side with other parts, summed in float32. Channel attention and
linear attention consist of these two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels._launch import on_device, start
from glocal.kernels.maps import power

MOST = 128  # channels of a group
_TOKENS = 64  # of a tile
_PROGRAMS = 2048  # at least, if there are so many tiles


@triton.jit
def products_kernel(
    a, b, out, totals, a_image, a_row, b_image, b_row, groups, tokens, per,
    D: tl.constexpr, E: tl.constexpr, WD: tl.constexpr, WE: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a: [B, N, groups * D], b: [B, N, groups * E] by strides; out: float32 [parts, B, groups, D, E].

    totals: float32 [parts, B, groups, D + E], sums of a and b over the tokens, or None. per: tokens of a part.
    """
    part, place = tl.program_id(1), tl.program_id(0)
    image, group = (place // groups).to(tl.int64), place % groups
    d, e, t = tl.arange(0, WD), tl.arange(0, WE), tl.arange(0, T)
    from_a, from_b = a + image * a_image + group * D, b + image * b_image + group * E
    found = tl.zeros([WD, WE], tl.float32)
    total_a, total_b = tl.zeros([WD], tl.float32), tl.zeros([WE], tl.float32)
    for first in range(part * per, tl.minimum(part * per + per, tokens), T):
        row = first + t
        live = (row < tokens)[:, None]
        left = tl.load(from_a + row[:, None] * a_row + d[None, :], mask=live & (d < D)[None, :], other=0.0)
        right = tl.load(from_b + row[:, None] * b_row + e[None, :], mask=live & (e < E)[None, :], other=0.0)
        found = tl.dot(tl.trans(left), right, acc=found, input_precision=PRECISION)
        if totals is not None:
            total_a += tl.sum(left.to(tl.float32), 0)
            total_b += tl.sum(right.to(tl.float32), 0)
    at = (part.to(tl.int64) * tl.num_programs(0) + place) * (D * E)
    tl.store(out + at + d[:, None] * E + e[None, :], found, mask=(d < D)[:, None] & (e < E)[None, :])
    if totals is not None:
        to = totals + (part.to(tl.int64) * tl.num_programs(0) + place) * (D + E)
        tl.store(to + d, total_a, mask=d < D)
        tl.store(to + D + e, total_b, mask=e < E)


@triton.jit
def apply_kernel(
    x, matrix, shift, plus, out, x_image, x_row, plus_image, plus_row, groups, tokens,
    D: tl.constexpr, E: tl.constexpr, WD: tl.constexpr, WE: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x: [B, N, groups * E] by strides, matrix: [B, groups, E, D]; out: [B, N, groups * D] contiguous.

    shift: float32 [B, groups * D], plus: [B, N, groups * D] by strides, summands of out, or None.
    """
    place = tl.program_id(0)
    image, group = (place // groups).to(tl.int64), place % groups
    row = tl.program_id(1) * T + tl.arange(0, T)
    d, e = tl.arange(0, WD), tl.arange(0, WE)
    live = (row < tokens)[:, None]
    value = tl.load(x + image * x_image + group * E + row[:, None] * x_row + e[None, :],
                    mask=live & (e < E)[None, :], other=0.0)  # fmt: skip
    weights = tl.load(matrix + place.to(tl.int64) * (D * E) + e[:, None] * D + d[None, :],
                      mask=(e < E)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
    found = tl.dot(value, weights.to(value.dtype), input_precision=PRECISION)
    if shift is not None:
        found += tl.load(shift + place.to(tl.int64) * D + d, mask=d < D, other=0.0)[None, :]
    if plus is not None:
        where = image * plus_image + group * D + row[:, None] * plus_row + d[None, :]
        found += tl.load(plus + where, mask=live & (d < D)[None, :], other=0.0).to(tl.float32)
    at = (image * tokens + row[:, None]) * (groups * D) + group * D + d[None, :]
    tl.store(out + at, found.to(out.dtype.element_ty), mask=live & (d < D)[None, :])


def products(a: Tensor, b: Tensor, groups: int, totals: bool = False) -> tuple[Tensor, Tensor | None]:
    """a: [B, N, groups * D], b: [B, N, groups * E], channels contiguous -> float32 [B, groups, D, E].

    totals: sums of a and b over the tokens too, float32 [B, groups, D + E].
    """
    images, tokens, d, e = a.shape[0], a.shape[1], a.shape[2] // groups, b.shape[2] // groups
    tiles = -(-tokens // _TOKENS)
    parts = max(1, min(tiles, -(-_PROGRAMS // (images * groups))))
    per = -(-tiles // parts) * _TOKENS
    parts = -(-tokens // per)
    out = a.new_empty(parts, images, groups, d, e, dtype=torch.float32)
    sums = a.new_empty(parts, images, groups, d + e, dtype=torch.float32) if totals else None
    with on_device(a):
        start(
            products_kernel,
            (images * groups, parts),
            a,
            b,
            out,
            sums,
            a.stride(0),
            a.stride(1),
            b.stride(0),
            b.stride(1),
            groups,
            tokens,
            per,
            **_sizes(a, d, e),
        )
    found, summed = (t if t is None else t[0] if parts == 1 else t.sum(0) for t in (out, sums))
    assert found is not None
    return found, summed


def apply(x: Tensor, matrix: Tensor, groups: int, shift: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """x: [B, N, groups * E], channels contiguous; matrix: [B, groups, E, D] -> [B, N, groups * D], of x's dtype.

    shift: float32 [B, groups, D], plus: [B, N, groups * D], channels contiguous: summands, or None.
    """
    images, tokens, d, e = x.shape[0], x.shape[1], matrix.shape[3], matrix.shape[2]
    matrix = matrix.to(x.dtype).contiguous()
    shift = None if shift is None else shift.contiguous()
    out = x.new_empty(images, tokens, groups * d)
    strides = (0, 0) if plus is None else (plus.stride(0), plus.stride(1))
    with on_device(x):
        start(
            apply_kernel,
            (images * groups, -(-tokens // _TOKENS)),
            x,
            matrix,
            shift,
            plus,
            out,
            x.stride(0),
            x.stride(1),
            *strides,
            groups,
            tokens,
            **_sizes(x, d, e),
        )
    return out


def _sizes(t: Tensor, d: int, e: int) -> dict[str, Any]:
    wide = {"WD": max(16, power(d)), "WE": max(16, power(e))}
    precision = "ieee" if t.dtype == torch.float32 else "tf32"
    return {"D": d, "E": e, **wide, "T": _TOKENS, "PRECISION": precision, "num_warps": 4}


class Products(torch.autograd.Function):
    """`products` with gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, groups: int) -> Tensor:
        """As `products`."""
        ctx.save_for_backward(a, b)
        ctx.groups = groups
        return products(a, b, groups)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a and b."""
        a, b = ctx.saved_tensors
        return apply(b, grads[0].mT, ctx.groups), apply(a, grads[0], ctx.groups), None


class Totals(torch.autograd.Function):
    """`products` and the sums of a and b over the tokens, [B, groups, D] and [B, groups, E], with gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `products`."""
        ctx.save_for_backward(a, b)
        ctx.groups = groups
        found, sums = products(a, b, groups, totals=True)
        assert sums is not None
        first, second = sums.split((a.shape[2] // groups, b.shape[2] // groups), 2)
        return found, first.contiguous(), second.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a and b."""
        a, b = ctx.saved_tensors
        grad, of_a, of_b = grads
        return apply(b, grad.mT, ctx.groups, of_a), apply(a, grad, ctx.groups, of_b), None


class Apply(torch.autograd.Function):
    """`apply` with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, groups: int, shift: Tensor | None, plus: Tensor | None) -> Tensor:
        """As `apply`."""
        ctx.save_for_backward(x, matrix)
        ctx.groups = groups
        return apply(x, matrix, groups, shift, plus)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the matrix and of the summands."""
        x, matrix = ctx.saved_tensors
        grad, groups, summed = grads[0].contiguous(), ctx.groups, None
        if ctx.needs_input_grad[3]:
            summed = grad.sum(1, dtype=torch.float32).unflatten(1, (groups, -1))
        of_matrix = products(x, grad, groups)[0].to(matrix.dtype)
        return apply(grad, matrix.mT, groups), of_matrix, None, summed, grad if ctx.needs_input_grad[4] else None
