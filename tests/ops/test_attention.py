"""The operator boundary: gradcheck, opcheck, compile, fake tensors, FLOPs, broadcasting, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from glocal.canvas import Canvas
from glocal.kernels import cpu
from glocal.kernels.call import Call, DenseBias, PlanTensors, TableBias
from glocal.kernels.capability import Sizes
from glocal.ops import Dense, PerKey, Relative, Score, attend, attention, explain
from glocal.patterns import Neighborhood
from glocal.plan.build import PlanSpec, plan
from glocal.routing import Keep, Partition, from_mask, route

CANVAS, PATTERN = Canvas((3, 5)), Neighborhood((3, 3))
KINDS: dict[str, dict[str, Any]] = {
    "cpu": {"pattern": PATTERN, "canvas": CANVAS, "backend": "cpu"},
    "dense": {"backend": "dense"},
    "reference": {"pattern": PATTERN, "canvas": CANVAS, "backend": "reference"},
}


def qkv(g: torch.Generator, heads: tuple[int, int] = (2, 1), n: int = 15, d: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((1, heads[0], n, d), (1, heads[1], n, d), (1, heads[1], n, d + 1))
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)
    return q, k, v


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradcheck_through_out_lse_and_biases(kind: str, generator: torch.Generator) -> None:
    sizes = ((2, 15, 15), (1, 1, 15), (2, 3, 3))
    bias = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in sizes]

    def run(q: Tensor, k: Tensor, v: Tensor, *terms: Tensor) -> tuple[Tensor, Tensor]:
        score = Score(bias=tuple(made(t) for made, t in zip((Dense, PerKey, Relative), terms, strict=False)))
        done = attend(q, k, v, score=score, **{"canvas": CANVAS, **KINDS[kind]})
        return done.out, done.lse

    assert torch.autograd.gradcheck(run, (*qkv(generator), *bias), fast_mode=True)
    assert torch.autograd.gradcheck(run, tuple(qkv(generator)), fast_mode=True)


def encoded(kind: str, g: torch.Generator) -> tuple[list[Tensor], str]:
    bias = (
        DenseBias(torch.randn(1, 2, 15, 15, generator=g, dtype=torch.float64).requires_grad_()),
        TableBias(
            torch.randn(2, 40, generator=g, dtype=torch.float64).requires_grad_(),
            torch.arange(15),
            torch.arange(15) + 15,
        ),
    )
    made = plan(PATTERN, CANVAS, PlanSpec(4, 4))
    call = {
        "cpu": Call("cpu", 0.3, 2.0, 4, 4, plan=PlanTensors(*made.tensors().values()), bias=bias),
        "dense": Call("dense", 0.3, bias=bias),
        "reference": Call("reference", 0.3, counts=made.dense_counts(), bias=bias),
    }[kind]
    return call.encode()


@pytest.mark.parametrize("kind", list(KINDS))
def test_opcheck(kind: str, generator: torch.Generator) -> None:
    data, spec = encoded(kind, generator)
    q, k, v = qkv(generator)
    torch.library.opcheck(torch.ops.glocal.attend, (q, k, v, data, spec))
    with torch.no_grad():
        out, lse = torch.ops.glocal.attend(q, k, v, data, spec)
        grads = [torch.ones_like(out), torch.ones_like(lse)]
        q, k, v = (t.detach() for t in (q, k, v))
        still = [t.detach() for t in data]
        torch.library.opcheck(torch.ops.glocal.attend_backward, (grads, q, k, v, out, lse, still, spec))


@pytest.mark.parametrize("kind", list(KINDS))
def test_compiled_fullgraph_is_equal(kind: str, generator: torch.Generator) -> None:
    inputs = qkv(generator)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 1.5, k, v, **KINDS[kind]).sin()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs))
    for a, b in zip(*(torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dense"])
def test_fake_tensors_have_the_shapes(kind: str) -> None:
    with FakeTensorMode():
        q, k, v = torch.empty(2, 4, 9, 8), torch.empty(2, 2, 9, 8), torch.empty(2, 2, 9, 5)
        out, lse = torch.ops.glocal.attend(q, k, v, *Call(kind, 0.3).encode())
    assert out.shape == (2, 4, 9, 5) and lse.shape == (2, 4, 9) and lse.dtype == torch.float32


def test_flops_are_those_of_visited_blocks(generator: torch.Generator) -> None:
    q, k, v = qkv(generator, (2, 2))
    made = plan(PATTERN, CANVAS, PlanSpec(4, 4))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, made, backend="cpu").sum().backward()
    pairs = int(made.visited_pairs) * 2
    forward, backward = pairs * 2 * (3 + 4), pairs * (6 * 3 + 4 * 4)
    assert counter.get_total_flops() == forward + backward


@pytest.mark.parametrize("kind", list(KINDS))
def test_eager_calls_go_past_the_dispatcher_and_give_the_same(kind: str, generator: torch.Generator) -> None:
    table = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = [*qkv(generator), table]

    def run() -> tuple[Tensor, ...]:
        done = attend(
            inputs[0], inputs[1], inputs[2], score=Score(bias=(Relative(table),)), **{"canvas": CANVAS, **KINDS[kind]}
        )
        return done.out, done.lse, *torch.autograd.grad(done.out.square().sum() + done.lse.sum(), inputs)

    with FlopCounterMode(display=False) as counter:  # a mode sees operators
        seen = run()
    assert any("glocal.attend_backward" in str(name) for name in counter.get_flop_counts()["Global"])
    for a, b in zip(run(), seen, strict=True):
        assert torch.equal(a, b)


def test_a_plan_that_was_used_may_not_change_before_backward(generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    made = plan(PATTERN, CANVAS, PlanSpec(4, 4))
    table = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)  # needs no gradient
    score = Score(bias=(Relative(table),))
    attention(q, k, v, made, score=score).sum().backward()
    assert q.grad is not None and table.grad is None
    out = attention(q, k, v, made, score=score)
    made.masks.add_(0)  # plan slots are written to in the same way
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_of_gradients_are_refused(generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    first = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no gradients of its gradients; where they are wanted, take"):
        first.sum().backward()


def test_a_choice_is_made_again_when_what_it_rests_on_changes(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (t.detach() for t in qkv(generator))
    made = {size: plan(PATTERN, CANVAS, PlanSpec(size, size)) for size in (4, 8)}

    def picked(size: int = 4, **score: Any) -> str:
        return attend(q, k, v, made[size], score=Score(**score)).picked.name

    assert [picked(), picked(8), picked(), picked(dropout=0.1)] == ["cpu", "cpu", "cpu", "reference"]
    monkeypatch.setattr(cpu, "CAPABILITY", replace(cpu.CAPABILITY, block_sizes=Sizes(8)))
    assert [picked(), picked(8)] == ["reference", "cpu"]
    monkeypatch.undo()
    assert picked() == "cpu"
    with pytest.raises(ValueError, match="backend='cpu' cannot run this call: dropout"):
        attention(q, k, v, made[4], score=Score(dropout=0.5), backend="cpu")


def test_leading_dimensions_broadcast(generator: torch.Generator) -> None:
    q = torch.randn(3, 1, 2, 15, 4, generator=generator)
    k, v = (torch.randn(4, 2, 15, 4, generator=generator) for _ in range(2))
    for options in KINDS.values():
        out = attention(q, k, v, **options)
        assert out.shape == (3, 4, 2, 15, 4)
        torch.testing.assert_close(out[1, 2], attention(q[1, 0], k[2], v[2], **options))


def test_without_a_batch_axis(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 15, 4, generator=generator) for _ in range(3))
    torch.testing.assert_close(
        attention(q, k, v, PATTERN, canvas=CANVAS), attention(q[None], k[None], v[None], PATTERN, canvas=CANVAS)[0]
    )


def test_explain_says_what_attend_does(generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    text = explain(q, k, v, PATTERN, canvas=CANVAS)
    assert "15 queries x 15 keys, 2 heads on 1, head size 3, float64 on cpu" in text
    assert f"runs: {attend(q, k, v, PATTERN, canvas=CANVAS).picked.name} " in text
    assert "flex: refuses dtype float64" in text and "plan: Neighborhood" in text
    assert "runs: dense" in explain(q, k, v)
    assert "does not run: backend='dense'" in explain(q, k, v, PATTERN, canvas=CANVAS, backend="dense")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0, 0], k, v), r"q of shape \(15, 3\) needs at least"),
        (lambda q, k, v: (q, k.float(), v), "k is torch.float32 on cpu, but q is torch.float64"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "q is torch.int32; legal: float32"),
        (lambda q, k, v: (q[..., :2], k, v), "head size of q is 2, of k 3"),
        (lambda q, k, v: (q, k, v[:, :, :9]), r"k has \(heads, tokens\) \(1, 15\), v has \(1, 9\)"),
        (
            lambda q, k, v: (torch.cat([q, q[:, :1]], 1), k.expand(1, 2, 15, 3), v.expand(1, 2, 15, 4)),
            "3 query heads do not",
        ),
        (lambda q, k, v: (q[:, :, :9], k, v), "q has 9 tokens, but"),
    ],
)
def test_bad_input_is_named(change: Any, message: str, generator: torch.Generator) -> None:
    q, k, v = change(*qkv(generator))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, PATTERN, canvas=CANVAS)


def test_arguments_of_another_kind_are_named(generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    with pytest.raises(TypeError, match="pattern is a Tensor; legal: Pattern, Selection, BlockPlan, PlanSlots, None"):
        attention(q, k, v, torch.ones(15, 15, dtype=torch.bool), canvas=CANVAS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Score: quant='int8'; legal: None or a Quant"):
        Score(quant="int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Score: bias is a Tensor; legal: a tuple of terms"):
        Score(bias=torch.zeros(15, 15))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Score: scale='auto'; legal: a number, a tensor of one entry"):
        Score(scale="auto")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"attention: score is a float; legal: Score\(scale=..., bias=...\), None"):
        attention(q, k, v, score=0.3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attention: k is a ndarray; legal: a Tensor"):
        attention(q, k.detach().numpy(), v)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attention: v is nested or sparse; legal: a plain tensor, and lengths= or"):
        attention(q, k, v.detach().to_sparse())
    with pytest.raises(ValueError, match="backend=None is unknown; legal: auto, dense, cpu"):
        attention(q, k, v, PATTERN, canvas=CANVAS, backend=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Dense: values are bool.*masked_fill\(~mask, -torch.inf\)"):
        Dense(torch.ones(15, 15, dtype=torch.bool))
    with pytest.raises(TypeError, match="Patterns join with patterns, not with a Tensor; a mask of blocks becomes one"):
        PATTERN | torch.ones(15, 15)  # type: ignore[operator]
    with pytest.raises(TypeError, match="attention: pattern is a str"):
        explain(q, k, v, "neighborhood", canvas=CANVAS)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(KINDS))
def test_types_that_differ_become_that_of_autocast(kind: str, generator: torch.Generator) -> None:
    q, k, v = (t.detach().float().requires_grad_() for t in qkv(generator))
    low_q, low_k, low_v = (t.bfloat16() for t in (q, k, v))
    want = attention(low_q, low_k, low_v, **KINDS[kind])
    with pytest.raises(ValueError, match="k is torch.bfloat16 on cpu, but q is torch.float32 on cpu; they must agree"):
        attention(q, low_k, v, **KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(q, low_k, v, **KINDS[kind])
        assert attention(q, k, v, **KINDS[kind]).dtype == torch.float32  # nothing is rounded that agrees
    assert torch.equal(found, want)
    for a, b in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (found, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch", [1, 4])
def test_lists_of_other_samples_are_refused(batch: int, backend: str, generator: torch.Generator) -> None:
    parts = Partition.blocks(CANVAS, (3, 1))
    chosen = from_mask(CANVAS, parts, parts, torch.rand(2, 1, 5, 5, generator=generator) < 0.5)
    x = torch.randn(batch, 2, 15, 4, generator=generator)
    with pytest.raises(ValueError, match=f"lists for 2 samples, q has {batch}; legal: for one or for each"):
        attention(x, x, x, chosen, backend=backend)
    with pytest.raises(TypeError, match="from_mask: mask is a Partition; legal: a bool or int tensor"):
        from_mask(CANVAS, torch.ones(5, 5), parts, parts)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"route: spec is a Keep; legal: RouteSpec\(q_part, kv_part, Keep"):
        route(x, x, CANVAS, Keep(top=1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plan: pattern is a NoneType; legal: a Pattern"):
        plan(None, CANVAS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"plan: spec=64; legal: PlanSpec\(q_block, kv_block\), None"):
        plan(PATTERN, CANVAS, 64)  # type: ignore[arg-type]
