"""Heads: joint projections cut into parts and heads, gradients coming back in one pass; the check of their number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glocal.kernels.windows.room import side_by_side


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """x: [B, N, parts * C], the parts side by side -> `parts` views [B, heads, N, C / heads].

    In eager calls on a GPU their gradients are written straight to where they belong in that of x; autograd itself
    would stack them and then turn the stack, twice the traffic.
    """
    if x.is_cuda and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Split.apply(x, parts, heads)  # type: ignore[no-any-return]
    return _views(x, parts, heads)


def _views(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    b, n, width = x.shape
    return x.reshape(b, n, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.cut = x.shape, (parts, heads)
        ctx.set_materialize_grads(False)
        return _views(x, parts, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return None, None, None
        made = [g for g in grads if g is not None]
        if len(made) == ctx.cut[0] and side_by_side(made):  # kernels wrote them where they belong
            _, n, width = ctx.shape
            return given.as_strided(ctx.shape, (n * width, width, 1), given.storage_offset()), None, None
        whole = given.new_empty(ctx.shape)
        for place, grad in zip(_views(whole, *ctx.cut), grads, strict=True):
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad)
        return whole, None, None


def check_heads(layer: str, dim: int, heads: int) -> None:
    """Raise ValueError unless `heads` divides `dim`."""
    if heads < 1 or dim % heads:
        legal = [h for h in range(1, dim + 1) if dim % h == 0]
        nearest = min(legal, key=lambda h: abs(h - heads))
        raise ValueError(f"{layer}: heads={heads} must divide dim={dim}; nearest number of heads that does: {nearest}.")
