"""Guests against the definition, with stand-ins for their packages: lists, tails, joins and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.kernels import reference, registry
from glocal.kernels.call import Call, Grads, PlanTensors
from glocal.kernels.guests import cudnn_sparse, fa4, fa4_dense, prepare
from glocal.ops import attend, attention
from glocal.patterns import CausalWindow, Neighborhood, PerHead
from glocal.plan.blockplan import BlockLists, BlockPlan
from glocal.plan.build import PlanSpec, plan

GUESTS: dict[str, Any] = {"fa4": fa4, "cudnn_sparse": cudnn_sparse}


@pytest.fixture(autouse=True)
def there(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages seem to be installed, and the records name the CPU."""
    for module in (fa4, cudnn_sparse, fa4_dense):
        record = replace(module.CAPABILITY, devices=("cpu", "cuda"), dtypes=(torch.float32,))
        if record.training is not None:
            record = replace(record, training=replace(record.training, devices=("cpu",), dtypes=(torch.float32,)))
        monkeypatch.setattr(module, "CAPABILITY", record)
        monkeypatch.setattr(module, "missing", lambda device: None)


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


def compared(
    made: BlockPlan, generator: torch.Generator, name: str, heads: tuple[int, int] = (2, 2), batch: int = 1
) -> None:
    """Out, LSE and gradients of a guest equal those of the definition."""
    (h, hk), n, m, d = heads, made.layout.nq, made.layout.nk, 8
    q, k, v, grad = (torch.randn(batch, a, b, d, generator=generator) for a, b in ((h, n), (hk, m), (hk, m), (h, n)))
    grad_lse = torch.randn(batch, h, n, generator=generator) * (name == "fa4")
    module = GUESTS[name]
    call = Call(name, scale=0.35, q_block=made.q_block, kv_block=made.kv_block, plan=PlanTensors(**made.tensors()))
    exact = Call("reference", scale=0.35, counts=made.dense_counts())
    want, want_lse = reference.forward(q, k, v, exact)
    out, lse = module.forward(q, k, v, call)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, want_lse, rtol=2e-5, atol=2e-5)
    found: Grads = module.backward(grad, grad_lse, q, k, v, out, lse, call)
    right: Grads = reference.backward(grad, grad_lse, q, k, v, want, want_lse, exact)
    for side in "qkv":
        a, b = getattr(found, side), getattr(right, side)
        torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-5, msg=lambda text, side=side: f"grad of {side}: {text}")


@pytest.mark.parametrize("name", GUESTS)
@pytest.mark.parametrize("n", [32, 41, 64, 71])
def test_full_and_partial_blocks_and_tails(name: str, n: int, generator: torch.Generator) -> None:
    made = plan(Neighborhood(21 if n == 32 else 37), Canvas((n,)), PlanSpec(16, 16))
    assert int(made.partial.count.sum()) > 0
    compared(made, generator, name)


@pytest.mark.parametrize("name", GUESTS)
def test_tiles_in_their_own_order(name: str, generator: torch.Generator) -> None:
    made = plan(Neighborhood((5, 9)), Canvas((10, 13)), PlanSpec(16, 16))
    compared(made, generator, name, heads=(4, 4), batch=2)


def test_grouped_heads(generator: torch.Generator) -> None:
    for heads, patterns in (((4, 2), 1), ((4, 2), 2), ((4, 2), 4), ((3, 1), 3)):
        made = plan(PerHead(tuple(Neighborhood(9 + 4 * i) for i in range(patterns))), Canvas((70,)), PlanSpec(16, 16))
        compared(made, generator, "fa4", heads)


@pytest.mark.parametrize("name", GUESTS)
@pytest.mark.parametrize("kind", ["subset", "pads inside", "repeated keys", "reversed", "tails by head", "no block"])
def test_orders(name: str, kind: str, generator: torch.Generator) -> None:
    q_order, kv_order, n = torch.arange(48)[None, None], torch.arange(48)[None, None], (48, 48)
    seen = torch.rand(1, 3, 3, generator=generator) < 0.6
    seen[0, 1] = True
    if kind == "subset":
        q_order, kv_order = q_order.flip(-1)[..., :32], kv_order[..., 16:]
        seen = seen[:, :2, :2]
    elif kind == "pads inside":
        q_order[..., ::5], kv_order[..., 3] = -1, -1
    elif kind == "repeated keys":
        kv_order = kv_order // 3
    elif kind == "reversed":
        q_order, kv_order = q_order.flip(-1), kv_order.flip(-1)
    elif kind == "tails by head":
        kv_order = kv_order.repeat(1, 2, 1)
        kv_order[:, 0, 40:], kv_order[:, 1, 35:] = -1, -1
    elif kind == "no block":
        seen[0, 2] = False
    compared(lists(q_order, kv_order, n, (16, 16), seen), generator, name)


def test_nothing_is_listed(generator: torch.Generator) -> None:
    order = torch.arange(32)[None, None]
    compared(lists(order, order, (32, 32), (16, 16), torch.zeros(1, 2, 2, dtype=torch.bool)), generator, "fa4")


def test_a_block_listed_twice_counts_twice(generator: torch.Generator) -> None:
    order = torch.cat([torch.arange(28), torch.full((4,), -1)])[None, None]
    made = lists(order, order, (28, 28), (16, 16), torch.ones(1, 2, 2, dtype=torch.bool))
    again = BlockLists(torch.tensor([[3, 3]]).int(), torch.tensor([[[0, 1, 0], [1, 0, 1]]]).int())
    compared(replace(made, full=again), generator, "fa4")
    with pytest.raises(ValueError, match="a list of this plan repeats a key block, which its backward cannot count"):
        compared(replace(made, full=again), generator, "cudnn_sparse")


def test_a_query_in_two_slots_is_refused(generator: torch.Generator) -> None:
    q_order = torch.cat([torch.arange(16), torch.arange(16)])[None, None]
    made = lists(q_order, torch.arange(16)[None, None], (16, 16), (16, 16), torch.ones(1, 2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend='fa4': this plan holds a query in 2 slots; legal: each query once"):
        compared(made, generator, "fa4")


def test_orders_by_sample_and_head(generator: torch.Generator) -> None:
    q_order = torch.stack([torch.randperm(48, generator=generator) for _ in range(4)]).view(2, 2, 48)
    kv_order = torch.stack([torch.randperm(48, generator=generator) for _ in range(2)]).view(1, 2, 48)
    made = lists(q_order, kv_order, (48, 48), (16, 16), torch.rand(3, 3, 3, generator=generator) < 0.5)
    made = replace(made, owner=torch.randint(0, 3, (2, 2), generator=generator).int())
    for heads in ((2, 2), (4, 2), (2, 1)):
        compared(made, generator, "fa4", heads, batch=2)


def test_a_plan_is_looked_at_once(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    made = plan(CausalWindow(20), Canvas((64,)), PlanSpec(16, 16))
    call = Call("fa4", scale=1.0, q_block=16, kv_block=16, plan=PlanTensors(**made.tensors()))
    first = prepare.prepare(call, 64, 64, "fa4")
    assert prepare.prepare(call, 64, 64, "fa4") is first
    made.full.count.add_(0)  # changed in place: looked at again
    second = prepare.prepare(call, 64, 64, "fa4")
    assert second is not first
    assert call.plan is not None
    other = replace(call, plan=replace(call.plan, part_count=call.plan.part_count.clone()))
    assert prepare.prepare(other, 64, 64, "fa4") is not second


@pytest.mark.parametrize("name", GUESTS)
def test_through_the_operator_with_gradients(name: str, generator: torch.Generator) -> None:
    width = 64 if name == "fa4" else 128
    pattern, canvas = Neighborhood((9, 33)), Canvas((12, 40))
    q, k, v = (torch.randn(1, 2, 480, width, generator=generator).requires_grad_() for _ in range(3))
    found, want = (attention(q, k, v, pattern, canvas=canvas, backend=b) for b in (name, "reference"))
    torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-5)
    along = torch.randn(found.shape, generator=generator)
    for a, b in zip(*(torch.autograd.grad(t, (q, k, v), along) for t in (found, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_lse_is_refused_where_the_guest_has_none(generator: torch.Generator) -> None:
    pattern, canvas = Neighborhood((9, 33)), Canvas((12, 40))
    q, k, v = (torch.randn(1, 2, 480, 128, generator=generator).requires_grad_() for _ in range(3))
    with pytest.raises(ValueError, match=r"backend='cudnn_sparse' cannot run this call: a gradient of the LSE \(not"):
        attend(q, k, v, pattern, canvas=canvas, backend="cudnn_sparse")
    with torch.no_grad():
        assert attend(q, k, v, pattern, canvas=canvas, backend="cudnn_sparse").picked.name == "cudnn_sparse"
    assert attend(q, k, v, pattern, canvas=canvas, backend="fa4").picked.name == "fa4"


def test_dense(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, h, 40, 16, generator=generator).requires_grad_() for h in (4, 2, 2))
    found, want = (attend(q, k, v, backend=b) for b in ("fa4_dense", "reference"))
    torch.testing.assert_close(found.out, want.out, rtol=2e-5, atol=2e-5)
    along = (torch.randn(found.out.shape, generator=generator), torch.randn(found.lse.shape, generator=generator))
    grads = [torch.autograd.grad((t.out, t.lse), (q, k, v), along) for t in (found, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_a_guest_cannot_do_is_said() -> None:
    base = registry.Request("cpu", torch.float32, 1, 8, 8, 4096, 4096, 128, 128, grad=True)

    def refused(name: str, blocks: tuple[int, int] = (128, 128), **changes: Any) -> str:
        with pytest.raises(ValueError) as error:
            registry.pick(replace(base, **changes), name, blocks=blocks, kept=0.1)
        return str(error.value)

    assert "query heads a key head 4 (legal: sizes from 1 to 1)" in refused("cudnn_sparse", kv_heads=2)
    assert "head size 64 (legal: sizes from 128 to 128)" in refused("cudnn_sparse", head_dim=64)
    assert "key block 64 (legal: multiples of 128 from 128 to 128)" in refused("fa4", (128, 64))
    mixed = refused("cudnn_sparse", (128, 64))
    assert "query blocks of 128 with key blocks of 64 (legal: equal sizes)" in mixed
    assert "head size 20 (legal: multiples of 8 from 8 to 128)" in refused("fa4", head_dim=20)
    assert "a dense bias (legal: none)" in refused("fa4", bias=("dense",))
    assert "lengths or documents (not supported)" in refused("fa4", segments=True)
    forward = replace(base, grad=False, kv_heads=2, head_dim=64)
    assert registry.pick(forward, "cudnn_sparse", blocks=(64, 64), kept=0.1).name == "cudnn_sparse"


def test_auto_never_takes_a_guest_unmeasured() -> None:
    base = registry.Request("cpu", torch.float32, 1, 8, 8, 4096, 4096, 128, 128)
    assert registry.pick(base, "auto", blocks=None, kept=0.1).name == "cpu"
    assert registry.pick(replace(base, sparse=False), "auto", blocks=None, kept=1.0).name == "dense"
