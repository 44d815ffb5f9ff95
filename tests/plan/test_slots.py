"""Slots whose contents change outside a compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.ops import attend, attention
from glocal.patterns import Neighborhood
from glocal.plan import PlanSlots, PlanSpec, plan, plan_blocks
from glocal.routing import Partition


def windows(*sizes: int) -> list:
    return [plan(Neighborhood(s), Canvas((64,)), PlanSpec(16, 16)) for s in sizes]


def test_what_is_written_is_what_runs(generator: torch.Generator) -> None:
    narrow, wide = windows(9, 41)
    slots = PlanSlots(narrow, masks=40)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=generator) for _ in range(3))
    for made in (narrow, wide, narrow):
        done = attend(q, k, v, slots.write(made))
        want = attend(q, k, v, made)
        torch.testing.assert_close(done.out, want.out)
        torch.testing.assert_close(done.lse, want.lse)


def test_no_recompile_when_the_contents_change(generator: torch.Generator) -> None:
    layout, part = Layout.of(Canvas((64,))), Partition.blocks(64, 16)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=generator) for _ in range(3))

    def picks(share: float) -> Tensor:
        return torch.rand(1, 2, 4, 4, generator=generator) < share

    slots = PlanSlots(plan_blocks(picks(0.5), layout, part, part))
    graphs = 0

    def counted(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, slots) * 2, fullgraph=True, backend=counted)
    results = []
    for share in (0.2, 0.5, 0.9, 0.0):
        made = plan_blocks(picks(share), layout, part, part)
        slots.write(made)
        results.append(compiled(q, k, v))
        torch.testing.assert_close(results[-1], attention(q, k, v, made) * 2)
    assert graphs == 1
    assert bool((results[-1] == 0).all()) and not torch.equal(results[0], results[1])


def test_layers_and_steps_share_a_graph_with_gradients(generator: torch.Generator) -> None:
    layout, part = Layout.of(Canvas((48,))), Partition.blocks(48, 16)
    weight = torch.nn.Parameter(torch.randn(8, 8, generator=generator))
    x = torch.randn(1, 2, 48, 8, generator=generator)
    maps = [torch.rand(1, 1, 3, 3, generator=generator) < 0.6 for _ in range(3)]
    slots = PlanSlots(plan_blocks(maps[0], layout, part, part))

    def loss(x: Tensor) -> Tensor:
        y = x @ weight
        return attention(y, y, y, slots).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for picked in maps:
        made = plan_blocks(picked, layout, part, part)
        slots.write(made)
        found = torch.autograd.grad(compiled(x), weight)[0]
        y = x @ weight
        want = torch.autograd.grad(attention(y, y, y, made).square().sum(), weight)[0]
        torch.testing.assert_close(found, want)


def test_what_does_not_fit_is_refused() -> None:
    narrow, wide = windows(9, 41)
    with pytest.raises(ValueError, match=r"masks of shape .* does not go into .*; legal: at most that; give the slots"):
        PlanSlots(narrow).write(wide)
    other = plan(Neighborhood(9), Canvas((48,)), PlanSpec(16, 16))
    with pytest.raises(ValueError, match=r"has 48 x 48 tokens in blocks of 16 x 16, the slots 64 x 64"):
        PlanSlots(narrow).write(other)
    assert "lists of at most 4 blocks" in repr(PlanSlots(narrow))
