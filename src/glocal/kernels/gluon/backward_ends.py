"""After the backward kernel of Hopper: float32 sums to gradients of tokens (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import row_of


@triton.jit
def _down(row, W: tl.constexpr):
    """Where a row of the sums begins."""
    return row.to(tl.int64) // 16 * (16 * W) + row % 8 * 16 + row // 8 % 2 * 2


@triton.jit
def after_kernel(
    sums, out, order, starts, heads, n, room, tiles, factor,
    D: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Query gradients [B, H, n, D] from float32 sums [B, H, room, W], times factor.

    DIRECT: no token has two slots, and `order` [b, h, room] holds the token of each; a program takes slots. Otherwise
    `order` holds the slots by token and `starts` where those of a token begin; a program takes tokens.
    """
    pid = tl.program_id(0)
    member = pid // tiles
    b, h = member // heads, member % heads
    first = (pid % tiles) * BN + tl.arange(0, BN)
    column = tl.arange(0, W)
    start = sums + member.to(tl.int64) * room * W
    across = column // 8 * 128 + column % 8 // 2 * 4 + column % 2
    if DIRECT:
        token = tl.load(row_of(order, b, h) + first, mask=first < room, other=-1)
        place = (pid % tiles).to(tl.int64) * (BN * W) + tl.arange(0, BN * W)
        acc = tl.reshape(tl.load(start + place), [BN // 16, W // 8, 8, 4, 2, 2])
        acc = tl.reshape(tl.permute(acc, (0, 4, 2, 1, 3, 5)), [BN, W])
    else:
        token = tl.where(first < n, first, -1)
        acc = tl.zeros([BN, W], tl.float32)
        begin = tl.load(row_of(starts, b, h) + token, mask=token >= 0, other=0)
        count = tl.load(row_of(starts, b, h) + token + 1, mask=token >= 0, other=0) - begin
        for i in range(tl.max(count, 0)):
            live = i < count
            slot = tl.load(row_of(order, b, h) + begin + i, mask=live, other=0)
            acc += tl.load(start + _down(slot, W)[:, None] + across[None, :], mask=live[:, None], other=0.0)
    to = out + (member.to(tl.int64) * n + token)[:, None] * D + column[None, :]
    tl.store(to, (acc * factor).to(out.dtype.element_ty), mask=(token >= 0)[:, None] & (column < D)[None, :])


@triton.jit
def _portion(sums, out, member, row, to_row, column, first, parts, side, KB: tl.constexpr, W: tl.constexpr):
    """Sum of the portions of keys (side 0) or values (1) from place `first` on."""
    place = (first.to(tl.int64) * 2 + side) * KB
    acc = tl.zeros([row.shape[0], W], tl.float32)
    for i in range(parts):
        acc += tl.load(sums + (place + i * 2 * KB + row)[:, None] * W + column[None, :])
    to = out[0] + (member.to(tl.int64) * out[1] + to_row)[:, None] * out[2] + column[None, :]
    tl.store(to, acc.to(out[0].dtype.element_ty), mask=(to_row >= 0)[:, None] & (column < out[2])[None, :])


@triton.jit
def portions_kernel(
    sums, cut, grad_k, grad_v, order, units, blocks, shared,
    W: tl.constexpr, KB: tl.constexpr, BN: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys whose lists were cut, from the sums [places, 2, KB, W] of their portions.

    cut: as `Portions` has it. grad_k, grad_v: (pointer, rows, columns) of [B, units, rows, columns], by token if
    DIRECT, else by slot. order: tokens by slot. shared: query heads a unit. A program takes BN rows of both.
    """
    pid = tl.program_id(0)
    entry = cut + pid // (KB // BN) * 3
    number, first, parts = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    member = number // blocks
    b, unit = member // units, member % units
    row = pid % (KB // BN) * BN + tl.arange(0, BN)
    column = tl.arange(0, W)
    to_row = number % blocks * KB + row
    if DIRECT:
        to_row = tl.load(row_of(order, b, unit * shared) + to_row)
    _portion(sums, grad_k, member, row, to_row, column, first, parts, 0, KB, W)
    _portion(sums, grad_v, member, row, to_row, column, first, parts, 1, KB, W)
