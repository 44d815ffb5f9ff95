"""The window kernels against the definition; `test_windows.py` starts this file under Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.kernels import reference
from glocal.kernels import windows as backend
from glocal.kernels.call import Call, Grads, PlanTensors
from glocal.kernels.windows import launch
from glocal.kernels.windows.room import side_by_side
from glocal.ops import Relative, Score, attend
from glocal.patterns import Grid, Neighborhood, Windows
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan
from glocal.plan.windows import window_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device, TRITON_INTERPRET is not 1"),
    pytest.mark.usefixtures("interpreter"),
]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the record name the CPU, so that whole calls reach the interpreted kernels."""
    monkeypatch.setattr(backend, "CAPABILITY", replace(backend.CAPABILITY, devices=("cpu", "cuda")))


@dataclass(frozen=True)
class Case:
    """A pattern on a map.

    heads: (query, key). dims: head and value size. bias: reach of a relative table, 0 for none.
    """

    pattern: Pattern
    shape: tuple[int, ...]
    heads: tuple[int, int] = (1, 1)
    dims: tuple[int, int] = (8, 8)
    images: int = 2
    bias: int = 0

    def plan(self) -> BlockPlan:
        """On the device of the tests."""
        return window_plan(self.pattern, Canvas(self.shape), device=DEVICE)


@dataclass(frozen=True)
class Inputs:
    """q, k, v as views of one packed tensor, gradients of out and LSE, and a table."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    table: Tensor

    @staticmethod
    def random(case: Case, g: torch.Generator, dtype: torch.dtype = torch.float32) -> Inputs:
        n, (h, hk), (d, dv) = case.plan().layout.nq, case.heads, case.dims
        packed = torch.randn(case.images, n, 3, h, max(d, dv), generator=g).to(DEVICE, dtype)
        q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
        grads = [torch.randn(case.images, h, n, size, generator=g).to(DEVICE) for size in (dv, 1)]
        table = torch.randn(h, *[2 * case.bias + 1] * len(case.shape), generator=g).to(DEVICE)
        return Inputs(q[..., :d], k[:, :hk, :, :d], v[:, :hk, :, :dv], grads[0].to(dtype), grads[1][..., 0], table)


Five = tuple[Tensor, Tensor, Grads]


def run(case: Case, x: Inputs, name: str, scale: float = 0.35) -> Five:
    """Forward and backward by the backend or by the definition."""
    module: Any = {"windows": backend, "reference": reference}[name]
    made = case.plan()
    bias = (Relative(x.table).lower(made.layout),) if case.bias else ()
    given: dict[str, Any] = {"scale": scale, "bias": bias}
    if name == "windows":
        plan_ = PlanTensors(**made.tensors())
        call = Call(name, q_block=made.q_block, kv_block=made.kv_block, plan=plan_, **given)
    else:
        call = Call(name, counts=made.dense_counts(), **given)
    out, lse = module.forward(x.q, x.k, x.v, call)
    return out, lse, module.backward(x.grad_out, x.grad_lse, x.q, x.k, x.v, out, lse, call)


def same(found: Five, want: Five, tolerance: float = 2e-5) -> None:
    """Out, LSE and every gradient agree, dtypes included."""
    pairs = [("out", found[0], want[0]), ("lse", found[1], want[1])]
    pairs += [(n, getattr(found[2], n), getattr(want[2], n)) for n in "qkv"]
    pairs += [(f"bias {i}", a, b) for i, (a, b) in enumerate(zip(found[2].bias, want[2].bias, strict=True))]
    for name, a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def compared(case: Case, x: Inputs, tolerance: float = 2e-5, scale: float = 0.35) -> Five:
    found = run(case, x, "windows", scale)
    same(found, run(case, x, "reference", scale), tolerance)
    return found


SMALL = Neighborhood(3)
CASES = {
    "2-D": Case(Neighborhood((3, 5)), (5, 7), heads=(2, 2), bias=2),
    "1-D dilated": Case(Neighborhood(5, dilation=3), (23,), bias=4),
    "3-D": Case(SMALL, (3, 4, 5), bias=1),
    "even, strided": Case(Neighborhood(4, stride=2), (9, 6)),
    "causal": Case(Neighborhood(3, causal=(True, False)), (6, 5)),
    "clipped": Case(Neighborhood(5, border="clip"), (7, 6), bias=1),
    "dilated, two axes": Case(Neighborhood(3, dilation=(1, 2)), (5, 7), bias=2),
    "windows": Case(Windows(3), (6, 7), bias=2),
    "shifted windows": Case(Windows(4, roll=2), (8, 8), bias=3),
    "whole windows, shifted": Case(Windows(6, roll=2), (12, 6), bias=5),
    "windows rolled without a mask": Case(Windows(4, roll=1, masked=False), (8, 4)),
    "grid": Case(Grid(3), (6, 7)),
    "wide windows": Case(Neighborhood(9), (12, 13), images=1, bias=2),
    "all keys": Case(Neighborhood(5), (5, 5), bias=4),
    "a single token": Case(Neighborhood(1), (1, 1)),
    "heads share keys of windows": Case(Windows(3), (6, 7), heads=(4, 2), bias=2),
    "heads share keys": Case(SMALL, (4, 5), heads=(6, 2), bias=1),
    "odd head sizes": Case(SMALL, (4, 5), dims=(5, 20), bias=1),
    "head size 64": Case(SMALL, (4, 5), dims=(64, 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name: str, generator: torch.Generator) -> None:
    compared(CASES[name], Inputs.random(CASES[name], generator))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale: float, generator: torch.Generator) -> None:
    case = CASES["2-D"]
    compared(case, Inputs.random(case, generator), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    case = Case(Neighborhood(5), (6, 7), bias=4)
    compared(case, Inputs.random(case, generator, dtype), tolerance=5e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="operands straight into registers need a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_16_bit_numbers_against_the_definition(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    case = CASES[name]
    x = Inputs.random(case, generator, dtype)
    found = run(case, x, "windows")
    exact = replace(x, **{f.name: getattr(x, f.name).double() for f in fields(x)})
    want = run(case, exact, "reference")
    pairs = [(found[0], want[0]), (found[1], want[1]), *zip(found[2].bias, want[2].bias, strict=True)]
    pairs += [(getattr(found[2], n), getattr(want[2], n)) for n in "qkv"]
    limit = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for a, b in pairs:
        assert float((a.double() - b).abs().max()) <= limit * float(b.abs().max().clamp(min=1e-3))


def test_a_table_for_all_heads(generator: torch.Generator) -> None:
    case = Case(SMALL, (4, 5), heads=(3, 3), bias=2)
    x = Inputs.random(case, generator)
    compared(case, replace(x, table=x.table[:1]))


def test_many_images_a_program(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Windows(3), (3, 6), images=5, bias=2)
    x = Inputs.random(case, generator)
    one = run(case, x, "windows")
    for images in (1, 2, 5):
        monkeypatch.setattr(launch, "images_a_program", lambda *_, images=images: images)
        same(compared(case, x), one, 1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="operands straight into registers need a GPU")
def test_images_of_a_program_change_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Neighborhood(7), (14, 15), heads=(4, 2), dims=(32, 32), images=5)  # several pieces of keys
    x = Inputs.random(case, generator, torch.bfloat16)
    found = []
    for images in (1, 2, 5):
        monkeypatch.setattr(launch, "images_a_program", lambda *_, images=images: images)
        found.append(run(case, x, "windows"))
    same(found[1], found[0], 0.0)
    same(found[2], found[0], 0.0)


def test_strides(generator: torch.Generator) -> None:
    case = Case(Neighborhood((3, 5)), (5, 6), bias=1)
    x = Inputs.random(case, generator)

    def turned(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.dim() == 4 else t

    usual = run(case, x, "windows")
    moved = replace(x, **{name: turned(getattr(x, name)) for name in ("q", "k", "v", "grad_out")})
    same(run(case, moved, "windows"), usual, 1e-6)
    spread = replace(x, grad_out=torch.ones((), device=DEVICE).expand(x.grad_out.shape))
    compared(case, spread)


@pytest.mark.parametrize("pattern", [Windows(3), SMALL], ids=["windows", "neighbourhoods"])
def test_results_lie_as_what_they_belong_to(pattern: Pattern, generator: torch.Generator) -> None:
    case = Case(pattern, (4, 6), heads=(2, 2), bias=2)
    x = Inputs.random(case, generator)
    out, _, grads = compared(case, x)
    assert out.transpose(1, 2).is_contiguous() and side_by_side((grads.q, grads.k, grads.v))
    k, v = torch.stack([x.k, x.v]).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
    out, _, grads = compared(case, replace(x, q=x.q.contiguous(), k=k, v=v))
    assert out.transpose(1, 2).is_contiguous() and side_by_side((grads.k, grads.v)) and grads.q.is_contiguous()
    alone = replace(x, q=x.q.contiguous(), k=x.k.contiguous(), v=x.v.contiguous())
    out, _, grads = compared(case, alone)
    assert all(t.is_contiguous() for t in (out, grads.q, grads.k, grads.v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ill", [torch.nan, torch.inf])
@pytest.mark.parametrize("pattern", [SMALL, Windows(3)], ids=["two passes", "one pass"])
def test_keys_that_are_not_finite_reach_only_rows_that_see_them(
    pattern: Pattern, ill: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = Case(pattern, (6, 7), bias=2)
    x = Inputs.random(case, generator, dtype)
    k, v = x.k.clone(), x.v.clone()
    k[1, :, 9], v[1, :, 30] = ill, ill
    out, _, grads = run(case, replace(x, k=k, v=v), "windows")
    counts = case.plan().dense_counts()[0, 0].bool()
    sees = counts[:, [9, 30]].any(1)
    usual, _, usual_grads = run(case, x, "windows")
    assert bool((~out[1, :, sees].isfinite()).any(-1).all())
    torch.testing.assert_close(out[1, :, ~sees], usual[1, :, ~sees], rtol=0, atol=0)
    torch.testing.assert_close(out[0], usual[0], rtol=0, atol=0)
    torch.testing.assert_close(grads.q[1, :, ~sees], usual_grads.q[1, :, ~sees], rtol=0, atol=0)
    far = ~counts[sees].any(0)  # keys that no tainted query sees
    for name in "kv":
        have, want = getattr(grads, name), getattr(usual_grads, name)
        torch.testing.assert_close(have[1, :, far], want[1, :, far], rtol=0, atol=0)


def test_two_calls_give_equal_bits(generator: torch.Generator) -> None:
    case = Case(Neighborhood(5), (7, 6), bias=4)
    x = Inputs.random(case, generator)
    same(run(case, x, "windows"), run(case, x, "windows"), 0.0)


def test_whole_calls_with_autograd(on_cpu: None, generator: torch.Generator) -> None:
    pattern, canvas = Windows(3, roll=1), Canvas((6, 6))
    inputs = [torch.randn(2, 2, 36, 8, generator=generator).to(DEVICE).requires_grad_() for _ in "qkv"]
    table = torch.randn(2, 5, 5, generator=generator).to(DEVICE).requires_grad_()
    results = []
    for name in ("windows", "reference"):
        score = Score(bias=(Relative(table),))
        done = attend(inputs[0], inputs[1], inputs[2], pattern, canvas=canvas, score=score, backend=name)
        assert done.picked.name == name
        results.append(torch.autograd.grad(done.out.square().sum() + done.lse.sum(), [*inputs, table]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_other_plans_are_refused(on_cpu: None, generator: torch.Generator) -> None:
    case = Case(SMALL, (4, 4))
    x = Inputs.random(case, generator)
    with pytest.raises(ValueError, match=r"no small windows \(legal: a product of single axes on one grid"):
        attend(x.q, x.k, x.v, SMALL | Windows(2), canvas=Canvas((4, 4)), backend="windows")
    other = plan(SMALL, Canvas((4, 4)), PlanSpec(16, 16), device=DEVICE)
    with pytest.raises(ValueError, match=r"key blocks of 16 tokens, 0 of them full; legal: partial blocks of 32"):
        attend(x.q, x.k, x.v, other, backend="windows")


def test_empty_batches(generator: torch.Generator) -> None:
    case = Case(SMALL, (4, 4), images=0, bias=1)
    out, lse, grads = run(case, Inputs.random(case, generator), "windows")
    assert out.shape == (0, 1, 16, 8) and lse.shape == (0, 1, 16)
    assert grads.q.shape == (0, 1, 16, 8) and bool((grads.bias[0] == 0).all())


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("window", [5, 7], ids=["narrow tiles", "wide tiles"])
def test_graphs_replay(window: int, generator: torch.Generator) -> None:
    case = Case(Neighborhood(window), (9, 11), bias=window // 2)
    x = Inputs.random(case, generator, torch.bfloat16)
    want = run(case, x, "windows")
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        found = run(case, x, "windows")
    for t in (found[0], found[2].q, found[2].k, found[2].v):
        t.zero_()
    made.replay()
    same(found, want, 0.0)


@pytest.mark.skipif(DEVICE == "cpu", reason="1,000 repeats need a GPU")
def test_no_races(generator: torch.Generator) -> None:
    case = Case(Neighborhood(7), (28, 28), heads=(3, 3), dims=(32, 32), images=8, bias=3)
    x = Inputs.random(case, generator, torch.bfloat16)
    want = run(case, x, "windows")
    changed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        found = run(case, x, "windows")
        for a, b in zip((*found[:2], *vars(found[2]).values()), (*want[:2], *vars(want[2]).values()), strict=True):
            a, b = (t[0] if isinstance(t, tuple) else t for t in (a, b))
            changed += (a != b).sum()
    assert int(changed) == 0
