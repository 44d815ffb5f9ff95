"""The kernels of Hopper against the definition on the CPU, by threads (`gluon_threads.py`).

`test_gluon_threads.py` starts this file in a process of its own, in which Triton interprets the kernels around it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import gluon_threads
import pytest
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal.canvas import Canvas
from glocal.kernels import reference
from glocal.kernels.call import Call, Grads, PlanTensors
from glocal.patterns import CausalWindow, Neighborhood, PerHead, StridedShards
from glocal.plan import BlockPlan, PlanSpec, plan

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1"),
]


@pytest.fixture(autouse=True)
def by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs by threads; that of the second pass, where there is one, is left out."""
    from glocal.kernels.gluon import launch, launch_backward
    from glocal.kernels.gluon.backward_kv import backward_kv_kernel
    from glocal.kernels.gluon.forward_q import forward_kernel

    usual = launch_backward.start

    def start(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        run = gluon_threads.run if kernel in (backward_kv_kernel, forward_kernel) else usual
        run(kernel, programs, *args, **constants)

    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(launch, "_processors", lambda _: 3)
    monkeypatch.setattr(launch_backward, "_grad_q", lambda w, x, q: torch.full_like(q, torch.nan))


def exact(made: BlockPlan, x: list[Tensor]) -> tuple[Tensor, Tensor, Grads]:
    """out, LSE and gradients in float64, for x = (q, k, v, gradients of out and LSE)."""
    q, k, v, grad, grad_lse = (t.double() for t in x)
    call = Call("reference", 0.3, counts=made.dense_counts())
    out, lse = reference.forward(q, k, v, call)
    return out, lse, reference.backward(grad, grad_lse, q, k, v, out, lse, call)


def found(made: BlockPlan, x: list[Tensor], out: Tensor, lse: Tensor) -> Grads:
    from glocal.kernels.gluon import launch_backward
    from glocal.kernels.triton.launch import Known

    call = Call("gluon", 0.3, q_block=made.q_block, kv_block=made.kv_block, plan=PlanTensors(**made.tensors()))
    return launch_backward.backward(Known(x[3], x[4], out.to(x[0].dtype), lse.float()), x[0], x[1], x[2], call)


def inputs(made: BlockPlan, heads: tuple[int, int], size: int, batch: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    n, m = made.layout.nq, made.layout.nk
    shapes = [(batch, h, t, size) for h, t in ((heads[0], n), (heads[1], m), (heads[1], m), (heads[0], n))]
    return [*(torch.randn(s, generator=g).bfloat16() for s in shapes), torch.randn(shapes[0][:3], generator=g)]


def same(made: BlockPlan, x: list[Tensor], names: str = "qkv") -> None:
    """Errors stay below the rounding of weights and results."""
    out, lse, want = exact(made, x)
    got = found(made, x, out, lse)
    for name in names:
        a, b = getattr(got, name).double(), getattr(want, name)
        assert float((a - b).abs().max()) < 2e-2 * float(b.abs().max()), name


@pytest.mark.parametrize(("size", "heads"), [(40, (2, 1)), (128, (1, 1))], ids=str)
def test_neighbourhood(size: int, heads: tuple[int, int]) -> None:
    made = plan(Neighborhood((9, 13)), Canvas((16, 24)), PlanSpec(128, 128))
    same(made, inputs(made, heads, size))


def test_blocks_of_64() -> None:
    made = plan(StridedShards(64, 1, 4, heads_q=2), Canvas((320,)), PlanSpec(64, 64))
    same(made, inputs(made, (2, 2), 64), "kv")


@pytest.mark.parametrize("pairs", [False, True], ids=["alone", "in pairs"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_lists_in_portions(heads: tuple[int, int], pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels.gluon import launch_backward, portions, reblocked
    from glocal.kernels.triton import work

    monkeypatch.setattr(work, "_PREPARED", WeakIdKeyDictionary())
    monkeypatch.setattr(portions, "_LEAST", 4)
    monkeypatch.setattr(reblocked, "MORE_BACKWARD", 2.0 if pairs else 0.0)
    usual, made_of = launch_backward.portions, []
    monkeypatch.setattr(launch_backward, "portions", lambda *a: made_of.append(usual(*a)) or made_of[-1])
    made = plan(StridedShards(64, 2, 8, heads_q=heads[0], num_kv_heads=2), Canvas((1024,)), PlanSpec(64, 64))
    same(made, inputs(made, heads, 16), "qkv" if pairs else "kv")
    assert made_of[0] is not None and made_of[0].places > 4


def test_unequal_blocks() -> None:
    made = plan(Neighborhood((9, 13)), Canvas((16, 24)), PlanSpec(64, 128))
    same(made, inputs(made, (1, 1), 64))


def test_lists_by_head_of_two_samples() -> None:
    made = plan(PerHead((Neighborhood(41), Neighborhood(161))), Canvas((200,)), PlanSpec(128, 128))
    same(made, inputs(made, (4, 2), 16, batch=2))


@pytest.mark.parametrize("n", [1, 129])
def test_tails(n: int) -> None:
    made = plan(CausalWindow(min(n, 99)), Canvas((n,)), PlanSpec(128, 128))
    same(made, inputs(made, (1, 1), 64))


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_bad_rows_reach_only_those_who_see_them(side: str) -> None:
    made = plan(CausalWindow(41), Canvas((300,)), PlanSpec(128, 128))
    x = inputs(made, (1, 1), 64)
    out, lse, _ = exact(made, x)
    usual = found(made, x, out, lse)
    pairs = made.dense_counts()[0, 0] > 0
    if side == "queries":
        x[0][:, :, 200], x[3][:, :, 230] = torch.nan, torch.inf
        rows = torch.zeros(300, dtype=torch.bool)
        rows[[200, 230]] = True
        lse[:, :, 200] = torch.nan
    else:
        x[1][:, :, 200], x[2][:, :, 230] = torch.nan, torch.inf
        rows = pairs[:, [200, 230]].any(1)
        out[:, :, rows], lse[:, :, rows] = torch.nan, torch.nan
    got = found(made, x, out, lse)
    far = ~pairs[rows].any(0)  # keys that no bad row sees
    torch.testing.assert_close(got.q[:, :, ~rows], usual.q[:, :, ~rows], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(got.k[:, :, far], usual.k[:, :, far], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(got.v[:, :, far], usual.v[:, :, far], rtol=1e-2, atol=1e-3)
    assert bool(got.q[:, :, rows].isnan().any(-1).all()) and int(far.sum()) > 100


def attended(made: BlockPlan, heads: tuple[int, int], size: int, batch: int = 1, joined: bool = False) -> None:
    """out and LSE of the forward kernel."""
    from glocal.kernels.gluon import launch

    x = inputs(made, heads, size, batch)
    want = exact(made, x)
    call = Call("gluon", 0.3, q_block=made.q_block, kv_block=made.kv_block, plan=PlanTensors(**made.tensors()))
    q, k, v = x[:3]
    w = launch.work_of(q, k, v, call)
    assert w.call.q_block == 128
    assert launch._tuned(w).joined == bool((made.full.count + made.partial.count > 0).all())
    out, lse = launch.forward(q, k, v, call, replace(launch._tuned(w), joined=joined, queries=1 + joined))
    assert float((out.double() - want[0]).abs().max()) < 2e-2 * float(want[0].abs().max())
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "one by one"])
@pytest.mark.parametrize("shape", ["shards", "neighbourhood, boxes", "window with tail", "lists by head"])
def test_forward(shape: str, joined: bool) -> None:
    pattern, canvas, heads = {
        "shards": (StridedShards(64, 20, 2, heads_q=4, num_kv_heads=2), (768,), (4, 2)),
        "neighbourhood, boxes": (Neighborhood((9, 13)), (16, 24), (2, 1)),
        "window with tail": (CausalWindow(99), (1001,), (1, 1)),
        "lists by head": (PerHead((Neighborhood(41), Neighborhood(161))), (600,), (4, 2)),
    }[shape]
    block = 64 if shape == "shards" else 128  # in pairs
    attended(plan(pattern, Canvas(canvas), PlanSpec(block, block)), heads, 128, 2, joined)


def test_forward_where_some_see_nothing() -> None:
    made = plan(CausalWindow(99), Canvas((1001,)), PlanSpec(128, 128))
    for count in (made.full.count, made.partial.count):
        count[:, [0, 3, 7]] = 0
    attended(made, (1, 1), 64)


def test_forward_keeps_bad_keys_from_those_who_do_not_see_them() -> None:
    from glocal.kernels.gluon import launch

    made = plan(CausalWindow(41), Canvas((300,)), PlanSpec(128, 128))
    q, k, v = inputs(made, (2, 1), 64)[:3]
    call = Call("gluon", 0.3, q_block=128, kv_block=128, plan=PlanTensors(**made.tensors()))
    usual = launch.forward(q, k, v, call)
    k[:, :, 200], v[:, :, 230] = torch.nan, torch.inf
    found = launch.forward(q, k, v, call)
    bad = (made.dense_counts()[0, 0] > 0)[:, [200, 230]].any(1)
    for a, b in zip(found, usual, strict=True):
        torch.testing.assert_close(a[:, :, ~bad], b[:, :, ~bad], rtol=1e-2, atol=1e-3)
    assert not bool(found[0][:, :, bad].isfinite().all(-1).any()) and int(bad.sum()) > 60


def test_a_wait_without_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = gluon_threads.Barrier()
    gluon_threads.mbarrier.init(bar, count=1)
    monkeypatch.setattr(gluon_threads, "SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="has no end"):
        bar.wait(0)
    gluon_threads.mbarrier.arrive(bar, count=1)
    bar.wait(0)
