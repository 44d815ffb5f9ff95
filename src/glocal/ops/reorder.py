"""Tokens into another order and back, several tensors at once, with RMS-norm and rotary embedding on the way.

A model that reorders its tokens once (arXiv 2504.16922) moves q, k and v together; on CUDA this is one pass at the
rate of a copy, and hosts that norm and rotate queries and keys pay nothing more for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from glocal.kernels import permute
from glocal.kernels.permute import Finish

__all__ = ["Finish", "finish_rows", "reorder", "restore"]


def reorder(tensors: Sequence[Tensor], order: Tensor, *, finish: Sequence[Finish | None] = ()) -> list[Tensor]:
    """Rows of each tensor by `order`.

    tensors: [B, H, N, D] each, any strides (also slices of a packed qkv); heads and head sizes may differ.
    order: int32 or int64 [B|1, H|1, M], the token of each slot; -1 gives a row of 0, repeats are legal. Its heads
        divide those of every tensor; consecutive heads share a row.
    finish: norm and rotation of each tensor, None for a tensor that is only moved.

    Returns [B, H, M, D] each, differentiable by the tensors and by weight, cos and sin of finish. Raises ValueError for
    shapes that do not fit.
    """
    permute.check(tensors, order, finish)
    steps = [Finish() if step is None else step for step in finish]
    data = [t for step in steps for t in step.tensors()]
    return _reorder(list(tensors), order, data, ";".join(map(_encode, steps)))


def finish_rows(tensors: Sequence[Tensor], finish: Sequence[Finish]) -> list[Tensor]:
    """Norm and rotation of each tensor where its rows lie, in one pass: [B, H, N, D] each, any strides.

    finish: one step for each tensor. Returns the same shapes, in memory as they were; differentiable as `reorder`.
    Raises ValueError for shapes that do not fit.
    """
    permute.check_rows(tensors, finish)
    data = [t for step in finish for t in step.tensors()]
    return _finish(list(tensors), data, ";".join(map(_encode, finish)))


def restore(t: Tensor, order: Tensor, n: int) -> Tensor:
    """The inverse of `reorder`: t [B, H, M, D] -> [B, H, n, D]; a token outside the order is 0. Differentiable.

    Each token stands at most once in the order: of repeats an arbitrary one would win.
    """
    permute.check([t], order, ())
    if t.shape[2] != order.shape[2]:
        raise ValueError(f"restore: t has {t.shape[2]} rows, order {order.shape[2]} slots; they must agree.")
    return _restore(t, order, n)


@torch.library.custom_op("glocal::reorder", mutates_args=())
def _reorder(tensors: list[Tensor], order: Tensor, data: list[Tensor], spec: str) -> list[Tensor]:
    return _room(order, tensors).gather_rows(tensors, order, _decode(data, spec))


@_reorder.register_fake
def _(tensors: list[Tensor], order: Tensor, data: list[Tensor], spec: str) -> list[Tensor]:
    return [t.new_empty(t.shape[0], t.shape[1], order.shape[2], t.shape[3]) for t in tensors]


@torch.library.custom_op("glocal::reorder_backward", mutates_args=())
def _reorder_backward(grads: list[Tensor], order: Tensor, tokens: list[int]) -> list[Tensor]:
    return [_room(order, grads).sum_rows(g, order, n) for g, n in zip(grads, tokens, strict=True)]


@_reorder_backward.register_fake
def _(grads: list[Tensor], order: Tensor, tokens: list[int]) -> list[Tensor]:
    return [g.new_empty(g.shape[0], g.shape[1], n, g.shape[3]) for g, n in zip(grads, tokens, strict=True)]


@torch.library.custom_op("glocal::finish", mutates_args=())
def _finish(tensors: list[Tensor], data: list[Tensor], spec: str) -> list[Tensor]:
    return _room(tensors[0], tensors).finish_rows(tensors, _decode(data, spec))


@_finish.register_fake
def _(tensors: list[Tensor], data: list[Tensor], spec: str) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


@torch.library.custom_op("glocal::finish_backward", mutates_args=())
def _finish_backward(grads: list[Tensor], tensors: list[Tensor], data: list[Tensor], spec: str) -> list[Tensor]:
    """Gradients [B, H, N, D] of finished tensors -> those of the tensors, then of all data, by the definition."""
    found = [
        permute.finished_backward(grad, t, step)
        for grad, t, step in zip(grads, tensors, _decode(data, spec), strict=True)
    ]
    return [one[0].clone(memory_format=torch.contiguous_format) for one in found] + [
        g.contiguous() for one in found for g in one[1:]
    ]


@_finish_backward.register_fake
def _(grads: list[Tensor], tensors: list[Tensor], data: list[Tensor], spec: str) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*tensors, *data)]


@torch.library.custom_op("glocal::restore", mutates_args=())
def _restore(t: Tensor, order: Tensor, n: int) -> Tensor:
    return _room(order, [t]).scatter_rows(t, order, n)


@_restore.register_fake
def _(t: Tensor, order: Tensor, n: int) -> Tensor:
    return t.new_empty(t.shape[0], t.shape[1], n, t.shape[3])


def _reorder_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, order, data, ctx.spec = inputs
    ctx.save_for_backward(order, *(tensors if data else ()), *data)
    ctx.tokens = [t.shape[2] for t in tensors]


def _reorder_grad(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    order, *saved = ctx.saved_tensors
    count = len(ctx.tokens)
    found = _reorder_backward(list(grads), order, ctx.tokens)
    if not saved:
        return found, None, [], None
    found = _finish_backward(found, saved[:count], saved[count:], ctx.spec)
    return found[:count], None, found[count:], None


def _restore_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _restore_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (order,) = ctx.saved_tensors
    return _reorder([grad], order, [], "")[0], None, None


def _finish_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, data, ctx.spec = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *data)


def _finish_grad(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved, count = ctx.saved_tensors, ctx.count
    found = _finish_backward(list(grads), list(saved[:count]), list(saved[count:]), ctx.spec)
    return found[:count], found[count:], None


_finish.register_autograd(_finish_grad, setup_context=_finish_setup)
_reorder.register_autograd(_reorder_grad, setup_context=_reorder_setup)
_restore.register_autograd(_restore_grad, setup_context=_restore_setup)


def _room(first: Tensor, tensors: Sequence[Tensor]) -> Any:
    """The module that moves: Triton's on CUDA, the definition elsewhere and in float64."""
    if first.is_cuda and find_spec("triton") is not None and all(t.dtype != torch.float64 for t in tensors):
        from glocal.kernels.triton import permute as fast

        return fast
    return permute


def _encode(step: Finish) -> str:
    return f"{step.weight is not None:d},{step.eps},{step.cos is not None:d},{step.interleaved:d}"


def _decode(data: list[Tensor], spec: str) -> list[Finish]:
    left, out = iter(data), []
    for word in spec.split(";") if spec else ():
        weight, eps, turned, interleaved = word.split(",")
        out.append(
            Finish(
                next(left) if weight == "1" else None,
                float(eps),
                *((next(left), next(left)) if turned == "1" else (None, None)),
                interleaved == "1",
            )
        )
    return out
