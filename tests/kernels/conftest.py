"""The common examination of kernels: cases, float64, plain torch at the same precision, the tolerance rule."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.ops import Dense, PerKey, Relative, Score, attend
from glocal.patterns import CausalWindow, Neighborhood, PerHead
from glocal.patterns.base import Pattern


@dataclass(frozen=True)
class Case:
    """One geometry; tensors are made from it at any precision."""

    pattern: Pattern | None
    canvas: Canvas | Layout
    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (8, 8)
    score: dict[str, Any] = field(default_factory=dict)
    bias: tuple[str, ...] = ()
    batch: int = 2

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and biases, values equal at every precision."""
        layout = Layout.of(self.canvas)
        g = torch.Generator().manual_seed(7)
        sizes = [(self.heads[0], layout.nq, self.dims[0]), (self.heads[1], layout.nk, self.dims[0])]
        sizes.append((self.heads[1], layout.nk, self.dims[1]))
        out = [torch.randn(self.batch, *s, generator=g) for s in sizes]
        shapes = {
            "dense": (self.heads[0], layout.nq, layout.nk),
            "key": (self.batch, 1, layout.nk),
            "table": (self.heads[0], *[5] * len(layout.kv.grid.axes if layout.kv.grids else (1,))),
        }
        out += [torch.randn(*shapes[kind], generator=g) for kind in self.bias]
        return [t.to(torch.bfloat16).to(dtype).requires_grad_() for t in out]

    def spec(self, bias: list[Tensor]) -> Score:
        """The Score of these biases."""
        kinds = {"dense": Dense, "key": PerKey, "table": Relative}
        return Score(bias=tuple(kinds[kind](t) for kind, t in zip(self.bias, bias, strict=True)), **self.score)


CASES = {
    "dense": Case(None, Canvas((5, 7))),
    "dense, grouped, Dv != D": Case(None, Canvas((5, 7)), heads=(6, 2), dims=(8, 5)),
    "dense, soft-cap, key bias": Case(None, Canvas((5, 7)), score={"softcap": 2.0}, bias=("key",)),
    "2-D": Case(Neighborhood((3, 5)), Canvas((7, 11))),
    "3-D with text": Case(Neighborhood((3, 3, 5)), Canvas((3, 5, 7), before=4)),
    "1-D dilated": Case(Neighborhood(5, dilation=3), Canvas((37,))),
    "one key head for seven": Case(Neighborhood((3, 5)), Canvas((7, 11)), heads=(7, 1)),
    "lists by query head": Case(PerHead((Neighborhood(3), Neighborhood(9))), Canvas((29,)), heads=(2, 1)),
    "Dv > D": Case(Neighborhood((3, 5)), Canvas((7, 11)), dims=(4, 12)),
    "soft-cap": Case(Neighborhood((3, 5)), Canvas((7, 11)), score={"softcap": 1.5, "scale": 0.7}),
    "biases": Case(Neighborhood((3, 5)), Canvas((7, 11)), bias=("dense", "key", "table")),
    "causal": Case(CausalWindow(6), Canvas((41,))),
}


@dataclass(frozen=True)
class Result:
    """What is compared: out, LSE and gradients of all inputs."""

    named: dict[str, Tensor]


def run(case: Case, backend: str, dtype: torch.dtype) -> Result:
    """Forward and backward through out and LSE."""
    inputs = case.tensors(dtype)
    q, k, v, *bias = inputs
    done = attend(q, k, v, case.pattern, canvas=case.canvas, score=case.spec(bias), backend=backend)
    assert done.picked.name == backend
    return _with_grads(done.out, done.lse, inputs)


def plain(case: Case, dtype: torch.dtype) -> Result:
    """The same in a few lines of torch at precision `dtype`, differentiated by autograd."""
    layout = Layout.of(case.canvas)
    inputs = case.tensors(dtype)
    q, k, v, *bias = inputs
    group = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * case.score.get("scale", q.shape[-1] ** -0.5)
    if "softcap" in case.score:
        s = case.score["softcap"] * torch.tanh(s / case.score["softcap"])
    for kind, t in zip(case.bias, bias, strict=True):
        if kind == "table":
            axes = list(layout.kv.grid.axes)
            grid = torch.cartesian_prod(*[torch.arange(n) for n in axes]).reshape(-1, len(axes))
            step = grid[None] - grid[:, None] + t.shape[-1] // 2
            inside = ((step >= 0) & (step < t.shape[-1])).all(-1)
            s = s + torch.where(inside, t[(slice(None), *step.clamp(0, t.shape[-1] - 1).unbind(-1))], 0)
        else:
            s = s + (t if kind == "dense" else t[:, :, None])
    if case.pattern is not None:
        s = s.masked_fill(~case.pattern.mask(layout), -torch.inf)
    lse = s.logsumexp(-1)
    return _with_grads(s.softmax(-1) @ v.repeat_interleave(group, 1), lse, inputs)


def _with_grads(out: Tensor, lse: Tensor, inputs: list[Tensor]) -> Result:
    g = torch.Generator().manual_seed(11)
    along = [torch.randn(t.shape, generator=g).to(torch.bfloat16).to(t.dtype) for t in (out, lse)]
    grads = torch.autograd.grad((out, lse), inputs, along)
    names = ["out", "lse", "dq", "dk", "dv", *(f"dbias{i}" for i in range(len(inputs) - 3))]
    return Result(dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True)))


def assert_close(found: Result, exact: Result, usual: Result, dtype: torch.dtype) -> None:
    """Largest and RMS error at most twice that of plain torch at the same precision, plus a small floor."""
    for name, want in exact.named.items():
        have, other = found.named[name].double(), usual.named[name].double()
        assert have.shape == want.shape, name
        floor = 32 * torch.finfo(dtype).eps * float(want.abs().max())
        for measure in (lambda t: float(t.abs().max()), lambda t: float(t.square().mean().sqrt())):
            mine, theirs = measure(have - want), measure(other - want)
            assert mine <= 2 * theirs + floor, f"{name}: error {mine:.3g}, plain torch {theirs:.3g}"


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every case in turn."""
    return CASES[request.param]


@pytest.fixture
def examine() -> Any:
    """`examine(case, backend, dtype)` runs one case and asserts the tolerance rule."""

    def check(case: Case, backend: str, dtype: torch.dtype) -> None:
        assert_close(run(case, backend, dtype), plain(case, torch.float64), plain(case, dtype), dtype)

    return check


@pytest.fixture(scope="module")
def interpreter() -> None:
    """Mend the interpreter of Triton 3.6: it reads loop bounds by int(array), which numpy 2.4 refuses for arrays of one
    entry, and multiplies the bits of bfloat16 as if they were integers.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    usual: Any = interpreter._patch_lang_tensor
    builder: Any = interpreter.InterpreterBuilder
    usual_dot: Any = builder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        usual(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def wide(t: Any) -> Any:
        if t.data.dtype != np.uint16:
            return t
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patched
    builder.create_dot = lambda self, a, b, *rest: usual_dot(self, wide(a), wide(b), *rest)
