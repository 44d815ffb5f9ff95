"""Heads: joint projections cut into parts and heads, gradients coming back in one pass; the check of their number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        whole = given.new_empty(ctx.shape)
        for place, grad in zip(_views(whole, *ctx.cut), grads, strict=True):
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad)
        return whole, None, None


def check_map(layer: nn.Module, x: Tensor, dim: int, rank: int = 2) -> None:
    """ValueError unless x is a map of `rank` axes with its channels last, [B, *map, dim]; it says how one is made."""
    if x.dim() == rank + 2 and x.shape[-1] == dim:
        return
    hint = "."
    if x.dim() == rank + 2 and x.shape[1] == dim:
        hint = f"; channels come last: x.permute(0, {', '.join(map(str, range(2, rank + 2)))}, 1)."
    elif x.dim() == 3 and x.shape[-1] == dim:
        hint = "; a sequence becomes a map by x.unflatten(1, map axes)."
    name, shape = type(layer).__name__, tuple(x.shape)
    raise ValueError(f"{name}: x of shape {shape} must be [batch, {rank} map axes, {dim}]{hint}")


def check_heads(layer: str, dim: int, heads: int) -> None:
    """Raise ValueError unless `heads` divides `dim`."""
    if heads < 1 or dim % heads:
        legal = [h for h in range(1, dim + 1) if dim % h == 0]
        nearest = min(legal, key=lambda h: abs(h - heads))
        raise ValueError(f"{layer}: heads={heads} must divide dim={dim}; nearest number of heads that does: {nearest}.")
