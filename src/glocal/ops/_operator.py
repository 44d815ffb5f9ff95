"""The one dispatcher boundary: ``glocal::attend`` and its backward, with fake, autograd and FLOP formula.

Where nothing looks at operators (no compiler, transform, dispatch mode, profiler or tensor subclass) an eager call goes
past the dispatcher, which would take several times as long as launching a kernel: `run` decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from glocal.kernels import registry
from glocal.kernels.call import Call, bias_places, parse, without


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Nq, Dv] and natural-log LSE [B, Hq, Nq], differentiable."""
    if torch.compiler.is_compiling():
        return attend(q, k, v, *call.encode())
    bias = call.differentiable()
    if _looked_at(q, k, v, *bias):
        return attend(q, k, v, *call.encode())
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *bias)):
        return _Direct.apply(call, q, k, v, *bias)  # type: ignore[return-value]
    return _forward(q, k, v, call)


def _looked_at(*tensors: Tensor) -> bool:
    """Whether somebody wants to see operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


_AS_Q_LIES = ("windows",)  # backends that lay results out as q, k and v lie, so that layers copy nothing


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    out, lse = registry.implementation(call.backend).forward(q, k, v, call)
    return (out, lse) if call.backend in _AS_Q_LIES else (out.contiguous(), lse.contiguous())


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.versions = call, _versions(call)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if _versions(ctx.call) != ctx.versions:
            raise RuntimeError(
                "attention: a tensor of the plan or of a bias has been modified by an inplace operation since forward."
            )
        wanted = any(ctx.needs_input_grad[4:])
        call = replace(ctx.call, lse_grad=grad_lse is not None, bias_grad=wanted)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if torch.is_grad_enabled():  # a graph of the gradients is wanted: the operator says that it has none
            data, spec = call.encode()
            given = [grad_out] if grad_lse is None else [grad_out, grad_lse]
            grads = attend_backward(
                given, q, k, v, out, lse, data, without(spec, lse=grad_lse is None, bias=not wanted)
            )
        else:
            grads = _backward_of(grad_out, grad_lse, (q, k, v, out, lse), call)
        return None, *grads, *([] if wanted else [None] * len(ctx.needs_input_grad[4:]))


def _versions(call: Call) -> list[int]:
    """How often the tensors of a call were written to."""
    return [0 if t.is_inference() else t._version for t in call.tensors()]


def _backward_of(grad_out: Tensor, grad_lse: Tensor | None, saved: tuple[Tensor, ...], call: Call) -> list[Tensor]:
    """Gradients of q, k, v and, unless none is owed, of every bias; saved: q, k, v, out, lse."""
    q, k, v, out, lse = saved
    to_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    found = registry.implementation(call.backend).backward(grad_out, to_lse, q, k, v, out, lse, call)
    grads = [found.q, found.k, found.v, *(found.bias if call.bias_grad else ())]
    return grads if call.backend in _AS_Q_LIES else [g.contiguous() for g in grads]


@torch.library.custom_op("glocal::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, data: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Nq, Dv] and natural-log LSE [B, Hq, Nq]; `data` and `spec` are an encoded `Call`."""
    out, lse = _forward(q, k, v, Call.decode(data, spec))
    return out.contiguous(), lse.contiguous()


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, data: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    return q.new_empty(b, h, n, v.shape[-1]), q.new_empty(b, h, n, dtype=lse_dtype(q.dtype))


@torch.library.custom_op("glocal::attend_backward", mutates_args=())
def attend_backward(
    grads: list[Tensor], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, data: list[Tensor], spec: str
) -> list[Tensor]:
    """Gradients of q, k, v and of every bias, given those of (out, lse), or of out alone if `spec` says so."""
    call = Call.decode(data, spec)
    found = _backward_of(grads[0], grads[1] if call.lse_grad else None, (q, k, v, out, lse), call)
    return [g.contiguous() for g in found]


@attend_backward.register_fake
def _(
    grads: list[Tensor], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, data: list[Tensor], spec: str
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)] + [
        torch.empty_like(data[i], memory_format=torch.contiguous_format) for i in bias_places(spec)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, data, spec = inputs
    ctx.save_for_backward(q, k, v, *output, *data)
    ctx.spec = spec
    ctx.set_materialize_grads(False)  # a kernel that need not carry a gradient of the LSE may be a faster one


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *data = ctx.saved_tensors
    wanted = any(data[place].requires_grad for place in bias_places(ctx.spec))
    spec = without(ctx.spec, lse=grad_lse is None, bias=not wanted)
    given = [torch.zeros_like(out) if grad_out is None else grad_out] + ([] if grad_lse is None else [grad_lse])
    grads = attend_backward(given, q, k, v, out, lse, data, spec)
    to_data: list[Tensor | None] = [None] * len(data)
    for place, grad in zip(bias_places(spec), grads[3:], strict=True):
        to_data[place] = grad
    return grads[0], grads[1], grads[2], to_data, None


attend.register_autograd(_backward, setup_context=_setup)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pairs(q: Tensor, k: Tensor, data: list[Tensor], spec: str) -> float:
    """Visited query-key pairs over all samples and heads."""
    s = parse(spec)
    rows = q.shape[0] * q.shape[1]
    if not s.plan:
        return float(rows * q.shape[2] * k.shape[2])
    full, part, owner = (data[s.plan[i]] for i in (2, 4, 8))
    blocks = (full.sum(-1) + part.sum(-1)).double()[owner.long()].mean()
    return float(blocks) * s.blocks[0] * s.blocks[1] * rows


@register_flop_formula(torch.ops.glocal.attend, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, data: list[Tensor], spec: str, *, out_val: Any = None, **_: Any) -> int:
    return int(2 * _pairs(q, k, data, spec) * (q.shape[-1] + v.shape[-1]))


@register_flop_formula(torch.ops.glocal.attend_backward, get_raw=True)
def _flops_backward(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    data: list[Tensor],
    spec: str,
    *,
    out_val: Any = None,
    **_: Any,
) -> int:
    return int(_pairs(q, k, data, spec) * (6 * q.shape[-1] + 4 * v.shape[-1]))
