"""The operator under torch.func: gradients, and vmap one sample after the other; the rest is refused in words."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from glocal._exact import exact
from glocal.kernels import registry
from glocal.kernels.call import Call, bias_places, without


class Attend(torch.autograd.Function):
    """out [B, Hq, Nq, Dv] and LSE [B, Hq, Nq] of a `Call` that is encoded as `spec` and `data`."""

    @staticmethod
    def forward(spec: str, q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        return forward_of(q, k, v, Call.decode(list(data), spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.spec = inputs[0]
        ctx.save_for_backward(*inputs[1:4], *output, *inputs[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out = ctx.saved_tensors[3]
        places = bias_places(ctx.spec)
        wanted = any(ctx.needs_input_grad[4 + place] for place in places)
        spec = without(ctx.spec, lse=grad_lse is None, bias=not wanted)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = Gradients.apply(spec, grad_out, grad_lse, *ctx.saved_tensors)
        to_data: list[Tensor | None] = [None] * (len(ctx.saved_tensors) - 5)
        for place, grad in zip(places if wanted else (), grads[3:], strict=True):
            to_data[place] = grad
        return None, *grads[:3], *to_data

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(Attend, info.batch_size, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise RuntimeError(
            "attention has no forward-mode derivatives (jvp, jacfwd, dual numbers); legal: reverse mode, as in "
            "torch.func.grad, vjp and jacrev."
        )


class Gradients(torch.autograd.Function):
    """Gradients of q, k, v and, unless `spec` says that none is owed, of every bias."""

    @staticmethod
    def forward(spec: str, grad_out: Tensor, grad_lse: Tensor | None, *saved: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradients_of(grad_out, grad_lse, saved[:5], Call.decode(list(saved[5:]), spec)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        refuse_second(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(Gradients, info.batch_size, in_dims, args)

    jvp = Attend.jvp


def forward_of(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """What the backend of the call computes: out and LSE, both contiguous."""
    with exact(q):
        out, lse = registry.implementation(call.backend).forward(q, k, v, call)
    return out.contiguous(), lse.contiguous()


def gradients_of(grad_out: Tensor, grad_lse: Tensor | None, saved: tuple[Tensor, ...], call: Call) -> list[Tensor]:
    """Gradients of q, k, v and, unless none is owed, of every bias; saved: q, k, v, out, lse."""
    q, k, v, out, lse = saved
    to_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    with exact(q):
        found = registry.implementation(call.backend).backward(grad_out, to_lse, q, k, v, out, lse, call)
    return [g.contiguous() for g in (found.q, found.k, found.v, *(found.bias if call.bias_grad else ()))]


def refuse_second(ctx: Any, *grads: Any) -> NoReturn:
    """The backward of the backward."""
    raise RuntimeError(
        "attention has no gradients of its gradients; where they are wanted, take torch's definition: "
        "scaled_dot_product_attention(q, k, v, attn_mask=pattern.mask(layout)) under sdpa_kernel(SDPBackend.MATH)."
    )


def _one_by_one(
    function: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Every sample is a call of its own; `None` marks what they share."""
    calls = [
        function.apply(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    joined = tuple(torch.stack(same) for same in zip(*calls, strict=True))
    return joined, (0,) * len(joined)
