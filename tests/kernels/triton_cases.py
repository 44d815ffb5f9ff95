"""The Triton backend against the definition; on a machine without CUDA the interpreter of Triton runs the kernels.

`test_triton.py` starts this file in a process of its own, because the interpreter must be chosen before anything
imports Triton. On a machine with CUDA: ``pytest tests/kernels/triton_cases.py`` runs the compiled kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.kernels import reference
from glocal.kernels import triton as backend
from glocal.kernels.call import Bias, Call, DenseBias, Grads, PlanTensors, TableBias
from glocal.kernels.triton import planning
from glocal.ops import attend
from glocal.patterns import CausalWindow, Neighborhood, PerHead
from glocal.plan import lists as lists_of
from glocal.plan import plan_blocks
from glocal.plan.blockplan import BlockLists, BlockPlan
from glocal.plan.build import PlanSpec, plan
from glocal.plan.facts import declared_turned
from glocal.routing import Partition
from glocal.testing import check

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
        if t.data.dtype != np.uint16:
            return t
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    builder: Any = interpreter.InterpreterBuilder

    interpreter._patch_lang_tensor = patched
    builder.create_dot = lambda self, a, b, *rest: usual_dot(self, wide(a), wide(b), *rest)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the record name the CPU, so that whole calls reach the interpreted kernels."""
    record = replace(backend.CAPABILITY, devices=("cpu", "cuda"))
    monkeypatch.setattr(backend, "CAPABILITY", record)


@dataclass(frozen=True)
class Sizes:
    """Heads (query, key), head size and value size, batch."""

    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (8, 8)
    batch: int = 1


@dataclass(frozen=True)
class Inputs:
    """q, k, v, gradients of out and LSE."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor

    @staticmethod
    def random(made: BlockPlan, sizes: Sizes, g: torch.Generator, dtype: torch.dtype = torch.float32) -> Inputs:
        (h, hk), (d, dv), b, n, m = sizes.heads, sizes.dims, sizes.batch, made.layout.nq, made.layout.nk
        shapes = ((b, h, n, d), (b, hk, m, d), (b, hk, m, dv), (b, h, n, dv))
        q, k, v, grad = (torch.randn(s, generator=g).to(dtype).to(DEVICE) for s in shapes)
        return Inputs(q, k, v, grad, torch.randn(b, h, n, generator=g).to(DEVICE))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*(change(getattr(self, n)) for n in self.__dataclass_fields__))


@dataclass(frozen=True)
class Extra:
    """What a call may carry beside a plan."""

    softcap: float | None = None
    bias: tuple[Bias, ...] = ()
    segments: tuple[Tensor, Tensor] | None = None


Five = tuple[Tensor, Tensor, Grads]


def run(made: BlockPlan, x: Inputs, extra: Extra, name: str) -> Five:
    """Forward and backward by a backend, or by the definition."""
    module: Any = {"triton": backend, "reference": reference}[name]
    made = made.to(DEVICE)
    given: dict[str, Any] = {"scale": 0.35, "softcap": extra.softcap, "bias": extra.bias, "segments": extra.segments}
    if name == "triton":
        call = Call(name, q_block=made.q_block, kv_block=made.kv_block, plan=PlanTensors(**made.tensors()), **given)
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


def compared(made: BlockPlan, x: Inputs, extra: Extra | None = None, tolerance: float = 2e-5) -> Five:
    extra = Extra() if extra is None else extra
    found = run(made, x, extra, "triton")
    same(found, run(made, x, extra, "reference"), tolerance)
    return found


def lists(q_order: Tensor, kv_order: Tensor, n: tuple[int, int], blocks: tuple[int, int], seen: Tensor) -> BlockPlan:
    """A plan of orders [b|1, h|1, room] and full blocks `seen`, bool [U, query blocks, key blocks], owner all 0."""
    nothing = torch.zeros_like(seen)
    return BlockPlan(
        layout=Layout(Canvas([Part("q", (n[0],))]), Canvas([Part("k", (n[1],))])),
        q_block=blocks[0],
        kv_block=blocks[1],
        q_order=q_order.int(),
        kv_order=kv_order.int(),
        full=BlockLists.from_dense(seen),
        partial=BlockLists.from_dense(nothing, nothing.int()),
        masks=torch.zeros(0, blocks[0], -(-blocks[1] // 32), dtype=torch.int32),
        owner=torch.zeros(1, 1, dtype=torch.int32),
    )


def window(n: int, size: int, blocks: tuple[int, int] = (16, 16)) -> BlockPlan:
    return plan(Neighborhood(size), Canvas((n,)), PlanSpec(*blocks))


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (7, 1), (4, 2)], ids=str)
def test_grouped_heads(heads: tuple[int, int], generator: torch.Generator) -> None:
    canvas = Canvas((5, 7) if sum(heads) < 6 else (3, 7))
    made = plan(Neighborhood((3, 5)), canvas, PlanSpec(16, 16))
    compared(made, Inputs.random(made, Sizes(heads), generator))


@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 64), (64, 32), (128, 128), (48, 96), (192, 160)], ids=str)
def test_blocks(blocks: tuple[int, int], generator: torch.Generator) -> None:
    made = window(71 if max(blocks) < 64 else 250, 43 if max(blocks) < 64 else 203, blocks)
    compared(made, Inputs.random(made, Sizes((1, 1)), generator))


@pytest.mark.parametrize("dims", [(1, 1), (40, 5), (16, 80), (256, 32)], ids=str)
def test_head_sizes(dims: tuple[int, int], generator: torch.Generator) -> None:
    made = window(20, 7)
    compared(made, Inputs.random(made, Sizes((1, 1), dims), generator))


@pytest.mark.parametrize("blocks", [(64, 128), (64, 32)], ids=str)
def test_wide_heads_cut_blocks(blocks: tuple[int, int], generator: torch.Generator) -> None:
    made = window(150, 131, blocks)
    assert int(made.full.count.sum()) > 0 and int(made.partial.count.sum()) > 0
    compared(made, Inputs.random(made, Sizes((1, 1), (256, 4)), generator), tolerance=5e-5)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33])
def test_every_tail(n: int, generator: torch.Generator) -> None:
    made = window(n, min(n, 9))
    compared(made, Inputs.random(made, Sizes((2, 1)), generator))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    made = window(40, 21)
    compared(made, Inputs.random(made, Sizes((2, 1)), generator, dtype), tolerance=4e-2)


def test_causal_and_soft_cap(generator: torch.Generator) -> None:
    made = plan(CausalWindow(20), Canvas((41,)), PlanSpec(16, 16))
    compared(made, Inputs.random(made, Sizes(), generator), Extra(softcap=0.8))


def test_lists_by_head(generator: torch.Generator) -> None:
    for heads, patterns in (((4, 2), 2), ((4, 2), 4)):
        made = plan(PerHead(tuple(Neighborhood(3 + 4 * i) for i in range(patterns))), Canvas((20,)), PlanSpec(16, 16))
        assert made.heads == patterns
        compared(made, Inputs.random(made, Sizes(heads), generator))


def test_lists_by_sample_and_head_in_their_own_order(generator: torch.Generator) -> None:
    q_order = torch.stack([torch.randperm(48, generator=generator) for _ in range(4)]).view(2, 2, 48)
    kv_order = torch.stack([torch.randperm(48, generator=generator) for _ in range(2)]).view(1, 2, 48)
    seen = torch.rand(3, 3, 3, generator=generator) < 0.5
    made = lists(q_order, kv_order, (48, 48), (16, 16), seen)
    owner = torch.randint(0, 3, (2, 2), generator=generator).int()
    made = replace(made, owner=owner)
    for heads in ((2, 2), (4, 2), (2, 1)):
        compared(made, Inputs.random(made, Sizes(heads, batch=2), generator))


@pytest.mark.parametrize("kind", ["subset", "pads", "repeated keys", "repeated queries", "repeated blocks"])
def test_orders(kind: str, generator: torch.Generator) -> None:
    q_order, kv_order = torch.arange(32), torch.arange(32)
    seen = torch.tensor([[[True, False], [True, True]]])
    if kind == "subset":
        q_order = q_order.flip(0)[:16]
        seen = seen[:, :1]
    elif kind == "pads":
        q_order[::5], kv_order[::3] = -1, -1
    elif kind == "repeated keys":
        kv_order = kv_order // 3
    elif kind == "repeated queries":
        q_order = torch.cat([torch.arange(16), torch.arange(16)])
    made = lists(q_order[None, None], kv_order[None, None], (32, 32), (16, 16), seen)
    if kind == "repeated blocks":
        count = torch.tensor([[3, 2]], dtype=torch.int32)
        made = replace(made, full=BlockLists(count, torch.tensor([[[0, 1, 0], [1, 1, 0]]], dtype=torch.int32)))
    out, lse, grads = compared(made, Inputs.random(made, Sizes((2, 1)), generator))
    absent = sorted(set(range(32)) - set(q_order.tolist()))
    assert bool((out[:, :, absent] == 0).all()) and bool((lse[:, :, absent] == -torch.inf).all())
    assert bool((grads.q[:, :, absent] == 0).all())


def test_rows_that_see_nothing(generator: torch.Generator) -> None:
    made = lists(
        torch.arange(32)[None, None],
        torch.arange(16)[None, None],
        (32, 16),
        (16, 16),
        torch.tensor([[[True], [False]]]),
    )
    out, lse, grads = compared(made, Inputs.random(made, Sizes((2, 1)), generator))
    assert bool((out[:, :, 16:] == 0).all()) and bool((lse[:, :, 16:] == -torch.inf).all())
    assert bool((grads.q[:, :, 16:] == 0).all())


@pytest.mark.parametrize("kind", ["dense", "key", "table", "all, two tables"])
def test_biases(kind: str, generator: torch.Generator) -> None:
    made = window(19, 11)
    code = torch.arange(19, device=DEVICE)
    dense = DenseBias(torch.randn(1, 2, 19, 19, generator=generator).to(DEVICE))
    key = DenseBias(torch.randn(2, 1, 1, 19, generator=generator).to(DEVICE))
    table = TableBias(torch.randn(2, 9, generator=generator).to(DEVICE), code, code + 4)
    shared = TableBias(torch.randn(1, 9, generator=generator).to(DEVICE), code, code + 2)
    bias = {"dense": (dense,), "key": (key,), "table": (table,)}.get(kind, (dense, table, key, shared))
    compared(made, Inputs.random(made, Sizes((2, 1), batch=2), generator), Extra(1.5, bias), tolerance=5e-5)


def test_segments(generator: torch.Generator) -> None:
    made = window(40, 39)
    documents = torch.tensor([[0] * 13 + [1] * 20 + [-1] * 7, [0] * 40], dtype=torch.int32, device=DEVICE)
    out, lse, _ = compared(
        made, Inputs.random(made, Sizes((1, 1), batch=2), generator), Extra(segments=(documents, documents))
    )
    assert bool((out[0, :, 33:] == 0).all()) and bool((lse[0, :, 33:] == -torch.inf).all())


def test_strides(generator: torch.Generator) -> None:
    made = window(20, 9)
    x = Inputs.random(made, Sizes((2, 1)), generator)

    def turned(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t.mT.contiguous().mT

    def poisoned(t: Tensor) -> Tensor:
        room = torch.full((*t.shape[:-1], t.shape[-1] + 8), torch.nan, device=t.device)
        room[..., :-8] = t
        return room[..., :-8]

    usual = run(made, x, Extra(), "triton")
    for change in (turned, poisoned):
        same(run(made, x.changed(change), Extra(), "triton"), usual, 1e-6)
    spread = replace(x, grad_out=torch.ones((), device=DEVICE).expand(x.grad_out.shape))
    compared(made, spread)


@pytest.mark.parametrize("ill", [torch.nan, torch.inf])
def test_keys_that_are_not_finite_reach_only_rows_that_see_them(ill: float, generator: torch.Generator) -> None:
    made = window(48, 9)
    x = Inputs.random(made, Sizes((2, 1)), generator)
    k, v = x.k.clone(), x.v.clone()
    k[:, :, 20], v[:, :, 22] = ill, ill
    out, _, grads = run(made, replace(x, k=k, v=v), Extra(), "triton")
    seen = made.dense_counts()[0, 0][:, [20, 22]].bool().any(1)
    assert bool(out[:, :, ~seen].isfinite().all()) and bool((~out[:, :, seen].isfinite()).any(-1).all())
    usual, _, usual_grads = run(made, x, Extra(), "triton")
    torch.testing.assert_close(out[:, :, ~seen], usual[:, :, ~seen], rtol=0, atol=0)
    torch.testing.assert_close(grads.q[:, :, ~seen], usual_grads.q[:, :, ~seen], rtol=0, atol=0)


def test_a_key_that_nobody_sees_does_not_leak(generator: torch.Generator) -> None:
    documents = torch.zeros(1, 40, dtype=torch.int32, device=DEVICE)
    documents[:, 30:] = -1
    made = window(40, 39)
    x = Inputs.random(made, Sizes((2, 1)), generator)
    k, v = x.k.clone(), x.v.clone()
    k[:, :, 30:], v[:, :, 30:] = torch.nan, torch.nan
    extra = Extra(segments=(documents, documents))
    same(run(made, replace(x, k=k, v=v), extra, "triton"), run(made, x, extra, "reference"))


def test_two_calls_give_equal_bits(generator: torch.Generator) -> None:
    made = window(33, 21)
    x = Inputs.random(made, Sizes((2, 1)), generator)
    same(run(made, x, Extra(), "triton"), run(made, x, Extra(), "triton"), 0.0)


def test_many_heads(generator: torch.Generator) -> None:
    """Heads and samples lie on the axis of a grid that counts to 2^31."""
    made = window(1, 1)
    x = Inputs.random(made, Sizes((70_000, 70_000) if DEVICE == "cuda" else (5, 5), (2, 2)), generator)
    compared(made, x)


def test_hostile_lists_are_refused(generator: torch.Generator) -> None:
    made = window(48, 9)
    x = Inputs.random(made, Sizes(), generator)
    far = BlockLists(made.partial.count, made.partial.index + 9, made.partial.mask)
    with pytest.raises(ValueError, match=r"partial.index holds \d+; legal: 0 to 2"):
        run(replace(made, partial=far), x, Extra(), "triton")


@pytest.mark.parametrize("axis", ["batch", "queries", "keys"])
def test_empty_axes(axis: str, generator: torch.Generator) -> None:
    n = (0 if axis == "queries" else 16, 0 if axis == "keys" else 16)
    seen = torch.ones(1, n[0] // 16, n[1] // 16, dtype=torch.bool)
    made = lists(torch.arange(n[0])[None, None], torch.arange(n[1])[None, None], n, (16, 16), seen)
    out, lse, grads = run(made, Inputs.random(made, Sizes(batch=int(axis != "batch")), generator), Extra(), "triton")
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
    assert all(bool((g == 0).all()) for g in (grads.q, grads.k, grads.v))


def test_whole_calls_with_autograd(on_cpu: None, generator: torch.Generator) -> None:
    canvas, pattern = Canvas((5, 7)), Neighborhood((3, 5))
    inputs = [torch.randn(1, 2, 35, 8, generator=generator, device="cpu").to(DEVICE).requires_grad_() for _ in "qkv"]
    results = []
    for name in ("triton", "reference"):
        done = attend(inputs[0], inputs[1], inputs[2], pattern, canvas=canvas, backend=name)
        assert done.picked.name == name
        results.append(torch.autograd.grad(done.out.square().sum() + done.lse.sum(), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["gna/na1d_odd_stride.safetensors"])
def test_published_numbers(name: str, on_cpu: None, golden: Callable[[str], Path]) -> None:
    result = check(golden(name), device=DEVICE, backend="triton")
    assert result.passed, result.verdict
    assert result.backend == "triton"


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (2, 70, 33), (1, 3, 0)], ids=str)
def test_lists_made_on_the_device(shape: tuple[int, int, int], generator: torch.Generator) -> None:
    picked = torch.rand(shape, generator=generator).to(DEVICE) < 0.4
    for mine, plain in (
        (planning.compact(picked, shape[2]), lists_of.compact(picked.cpu(), shape[2])),
        (planning.compact(picked, 3), lists_of.compact(picked.cpu(), 3)),
        (planning.compact_columns(picked), lists_of.compact_columns(picked.cpu())),
    ):
        for a, b in zip(mine, plain, strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("most", [1, 5, 40])
def test_entries_put_in_order(most: int, generator: torch.Generator) -> None:
    index = torch.randint(-1, 9, (2, 6, most), generator=generator).int().to(DEVICE)
    count = torch.randint(0, most + 1, (2, 6), generator=generator).int().to(DEVICE)
    for a, b in zip(planning.rising(index, count, 8), lists_of.plain_rising(index, count, 8), strict=True):
        assert torch.equal(a, b)


def test_tiles_seen_by_key_block(generator: torch.Generator) -> None:
    """Lists the other way round, made by the planner, give the gradients of those that are sorted here."""
    part = Partition.blocks(64, 16)
    picked = torch.rand(1, 2, 4, 4, generator=generator) < 0.5
    made = plan_blocks(picked, Layout.of(Canvas((64,))), part, part, backward=True)
    assert declared_turned(made.full.index) is not None
    compared(made, Inputs.random(made, Sizes((2, 1)), generator))
