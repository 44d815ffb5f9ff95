"""After the backward kernel of Hopper: float32 sums of query gradients to gradients of tokens (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

from glocal.kernels.triton.tile import row_of


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
    if DIRECT:
        token = tl.load(row_of(order, b, h) + first, mask=first < room, other=-1)
        acc = tl.load(start + first.to(tl.int64)[:, None] * W + column[None, :], mask=(token >= 0)[:, None], other=0.0)
    else:
        token = tl.where(first < n, first, -1)
        acc = tl.zeros([BN, W], tl.float32)
        begin = tl.load(row_of(starts, b, h) + token, mask=token >= 0, other=0)
        count = tl.load(row_of(starts, b, h) + token + 1, mask=token >= 0, other=0) - begin
        for i in range(tl.max(count, 0)):
            live = i < count
            slot = tl.load(row_of(order, b, h) + begin + i, mask=live, other=0)
            acc += tl.load(start + slot.to(tl.int64)[:, None] * W + column[None, :], mask=live[:, None], other=0.0)
    to = out + (member.to(tl.int64) * n + token)[:, None] * D + column[None, :]
    tl.store(to, (acc * factor).to(out.dtype.element_ty), mask=(token >= 0)[:, None] & (column < D)[None, :])
