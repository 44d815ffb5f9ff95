"""torch.func: gradients, per-sample gradients, vmap; forward mode and second derivatives are refused, never zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func

from glocal.canvas import Canvas
from glocal.ops import Dense, Relative, Score, attend, attention
from glocal.patterns import Neighborhood
from glocal.plan.build import clear_cache

CANVAS, PATTERN = Canvas((3, 5)), Neighborhood((3, 3))


def made(g: torch.Generator, *lead: int) -> list[Tensor]:
    return [torch.randn(*lead, 2, 15, 4, generator=g, dtype=torch.float64) for _ in range(3)]


def score_of(table: Tensor, dense: Tensor) -> Score:
    return Score(bias=(Relative(table), Dense(dense)))


def loss(q: Tensor, k: Tensor, v: Tensor, table: Tensor, dense: Tensor) -> Tensor:
    done = attend(q, k, v, PATTERN, canvas=CANVAS, score=score_of(table, dense))
    return done.out.square().sum() + done.lse.sin().sum()


def biases(g: torch.Generator) -> list[Tensor]:
    return [torch.randn(size, generator=g, dtype=torch.float64) for size in ((2, 3, 3), (2, 15, 15))]


def close(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_those_of_backward(generator: torch.Generator) -> None:
    given = [*made(generator, 2), *biases(generator)]
    places = tuple(range(5))
    clear_cache()  # the plan is made inside the transform, and serves calls outside of it
    found = func.grad(loss, argnums=places)(*given)
    leaves = [t.clone().requires_grad_() for t in given]
    close(found, torch.autograd.grad(loss(*leaves), leaves))


def test_gradients_of_every_sample(generator: torch.Generator) -> None:
    q, k, v = made(generator, 3, 2)
    table, dense = biases(generator)
    each = func.vmap(func.grad(loss, argnums=(0, 3, 4)), in_dims=(0, 0, 0, None, None))(q, k, v, table, dense)
    for i in range(3):
        close(tuple(t[i] for t in each), func.grad(loss, argnums=(0, 3, 4))(q[i], k[i], v[i], table, dense))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, None), (0, None, 2)])
def test_vmap_is_a_call_of_each_sample(in_dims: tuple[int | None, ...], generator: torch.Generator) -> None:
    given = [t if d is None else t.movedim(0, d) for t, d in zip(made(generator, 3, 2), in_dims, strict=True)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, PATTERN, canvas=CANVAS)

    given = [t if d is not None else t[0] for t, d in zip(given, in_dims, strict=True)]
    found = func.vmap(call, in_dims=in_dims)(*given)
    for i in range(3):
        picked = [t if d is None else t.select(d, i) for t, d in zip(given, in_dims, strict=True)]
        torch.testing.assert_close(found[i], call(*picked))


def test_gradients_through_vmap(generator: torch.Generator) -> None:
    q, k, v = made(generator, 3)

    def total(run: Callable[[Tensor], Tensor]) -> Tensor:
        return func.grad(lambda x: run(x).square().sum())(k)

    shared = func.vmap(lambda a, c, b: attention(a, b, c, PATTERN, canvas=CANVAS), in_dims=(0, 0, None))
    found = total(lambda x: shared(q, v, x[0]))
    torch.testing.assert_close(found, total(lambda x: attention(q, x[:1].expand_as(q), v, PATTERN, canvas=CANVAS)))


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("tracked", [False, True])
def test_forward_mode_is_refused(backend: str, tracked: bool, generator: torch.Generator) -> None:
    q, k, v = made(generator, 1)

    def call(x: Tensor) -> Tensor:
        return attention(x, k, v, PATTERN, canvas=CANVAS, backend=backend)

    with pytest.raises(RuntimeError, match="no forward-mode derivatives .* legal: reverse mode"):
        func.jvp(call, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            call(torch.autograd.forward_ad.make_dual(q.requires_grad_(tracked), q.detach()))
        call(q)  # no tangent, nothing to refuse


def test_second_derivatives_are_refused(generator: torch.Generator) -> None:
    q, k, v = made(generator, 1)
    twice = func.jacrev(func.grad(lambda x: attention(x, k, v, PATTERN, canvas=CANVAS).sum()))
    with pytest.raises(RuntimeError, match=r"no gradients of its gradients.*attn_mask=pattern\.mask\(layout\)"):
        twice(q)
