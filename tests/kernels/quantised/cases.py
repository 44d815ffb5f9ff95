"""Quantised kernels against their definition, and the join of two softmaxes; run by `test_quantised.py`.

Started in a process of its own with TRITON_INTERPRET=1, or compiled: ``pytest tests/kernels/quantised/cases.py``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.kernels import reference
from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.guests.join import joined
from glocal.kernels.quant import Quant
from glocal.kernels.quantised import emulate, launch
from glocal.kernels.quantised.work import work_of
from glocal.kernels.triton import join as fused
from glocal.patterns import Neighborhood, PerHead
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device, TRITON_INTERPRET is not 1")


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> None:
    """Mend the interpreter of Triton 3.6: it reads loop bounds by int(array), which numpy 2.4 refuses for arrays of one
    entry, and multiplies the bits of bfloat16 as if they were integers.
    """
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    usual: Any = interpreter._patch_lang_tensor
    usual_dot: Any = interpreter.InterpreterBuilder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        usual(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def wide(t: Any) -> Any:
        if t.data.dtype == np.int8:
            return interpreter.TensorHandle(t.data.astype(np.int32), tl.int32)
        if t.data.dtype != np.uint16:
            return t
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    builder: Any = interpreter.InterpreterBuilder
    interpreter._patch_lang_tensor = patched
    builder.create_dot = lambda self, a, b, *rest: usual_dot(self, wide(a), wide(b), *rest)


def case(kind: str, generator: torch.Generator) -> tuple[BlockPlan, tuple[int, int], int]:
    """A plan, heads and head size."""
    if kind == "tails":
        return plan(Neighborhood(41), Canvas((71,)), PlanSpec(32, 32)), (2, 2), 32
    if kind == "own order, grouped":
        return plan(Neighborhood((5, 7)), Canvas((9, 13)), PlanSpec(32, 32)), (4, 2), 24
    if kind == "lists by head":
        patterns = (Neighborhood(9), Neighborhood(61))
        return plan(PerHead(patterns), Canvas((96,)), PlanSpec(32, 32)), (2, 1), 32
    return plan(Neighborhood(75), Canvas((140,)), PlanSpec(64, 64)), (1, 1), 64


def both(made: BlockPlan, qkv: tuple[Tensor, ...], quant: Quant) -> tuple[tuple[Tensor, Tensor], ...]:
    """out and LSE of the kernels, of the definition and of exact attention."""
    made = made.to(DEVICE)
    call = Call(
        "quantised", 0.3, q_block=made.q_block, kv_block=made.kv_block, plan=PlanTensors(**made.tensors()), quant=quant
    )
    q, k, v = qkv
    work = work_of(call, q.shape[2], k.shape[2])
    exact = reference.forward(q, k, v, Call("reference", 0.3, counts=made.dense_counts()))
    tuning = launch.Tuning(rows=32 if INTERPRETED else 64)
    return launch.forward(q, k, v, call, work, tuning), emulate.forward(q, k, v, call, work), exact


@pytest.mark.parametrize("kind", ["tails", "own order, grouped", "lists by head", "blocks of 64"])
@pytest.mark.parametrize("pv", ["none", "int8"])
def test_int8(kind: str, pv: str, generator: torch.Generator) -> None:
    made, heads, d = case(kind, generator)
    n = made.layout.nq
    qkv = tuple(torch.randn(2, h, n, d, generator=generator).to(DEVICE) for h in (*heads, heads[1]))
    group = (32, 64) if kind == "blocks of 64" else (16, 32)
    found, want, exact = both(made, qkv, Quant("int8", pv, group, smooth_k=kind == "tails"))  # type: ignore[arg-type]
    near = 2e-5 if pv == "none" else 6e-3  # a weight on the edge of two integers may fall either way
    torch.testing.assert_close(found[0], want[0], rtol=near, atol=near)
    torch.testing.assert_close(found[1], want[1], rtol=1e-4, atol=1e-4)
    assert float((found[0] - exact[0]).norm() / exact[0].norm()) < 0.03
    torch.testing.assert_close(found[1], exact[1], rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter of Triton 3.6 multiplies no fp8")
@pytest.mark.parametrize("pv", ["none", "fp8"])
@pytest.mark.parametrize("kind", ["tails", "own order, grouped", "lists by head", "blocks of 64"])
def test_fp8(kind: str, pv: str, generator: torch.Generator) -> None:
    made, heads, d = case(kind, generator)
    n = made.layout.nq
    qkv = tuple(torch.randn(2, h, n, d, generator=generator).to(DEVICE, torch.bfloat16) for h in (*heads, heads[1]))
    found, want, exact = both(made, qkv, Quant("fp8", pv, (16, 32)))  # type: ignore[arg-type]
    for a, near in ((want, 0.02), (exact, 0.08)):
        assert float((found[0].float() - a[0].float()).norm() / a[0].float().norm()) < near
        torch.testing.assert_close(found[1], a[1], rtol=near, atol=near)


def test_a_key_scale_for_every_few_keys(generator: torch.Generator) -> None:
    made, _, d = case("tails", generator)
    qkv = tuple(torch.randn(1, 2, 71, d, generator=generator).to(DEVICE) for _ in range(3))
    found, want, _ = both(made, qkv, Quant("int8", "none", (1, 8)))
    torch.testing.assert_close(found[0], want[0], rtol=2e-5, atol=2e-5)


def test_join(generator: torch.Generator) -> None:
    a, b = (torch.randn(2, 3, 37, 20, generator=generator).to(DEVICE) for _ in range(2))
    one, two = (torch.randn(2, 3, 37, generator=generator).to(DEVICE) for _ in range(2))
    one[:, :, :5], two[:, :, 3:9] = -torch.inf, -torch.inf
    a[:, :, :5], b[:, :, 3:9] = 0, 0
    found, want = fused.join(a, one, b, two), joined(a, one, b, two)
    torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], want[1], rtol=1e-5, atol=1e-5)
    assert bool((found[0][:, :, 3:5] == 0).all())
