from __future__ import annotations

import pytest
import torch

from glocal.canvas import Canvas, Layout
from glocal.patterns import Causal, Neighborhood, per_head
from glocal.patterns.base import Dense
from glocal.routing import (
    BlockMean,
    Keep,
    Partition,
    PooledTopK,
    RouteSpec,
    from_mask,
    pooled_topk,
    route,
    visible_groups,
)


def qk(generator: torch.Generator, n: int, heads: int = 2, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = torch.randn(2, batch, heads, n, 8, generator=generator)
    return q, k


def test_pooled_topk_equals_the_plain_recipe(generator: torch.Generator) -> None:
    q, k = qk(generator, 32)
    found = pooled_topk(q, k, Canvas((32,)), 4, 3)
    means_q, means_k = (t.unflatten(2, (8, 4)).mean(3) for t in (q, k))
    want = (means_q @ means_k.transpose(-1, -2)).topk(3, dim=-1).indices
    assert torch.equal(found.index.long(), want)
    assert found.count.unique().tolist() == [3]
    assert found.scores is not None and not found.scores.requires_grad


def test_equivariant_to_permuted_groups(generator: torch.Generator) -> None:
    """No place of the sequence is preferred: permuted key blocks give permuted choices."""
    q, k = qk(generator, 64)
    q, k = q.bfloat16(), k.bfloat16()
    order = torch.randperm(16, generator=generator)
    shuffled = k.unflatten(2, (16, 4))[:, :, order].flatten(2, 3)
    before = pooled_topk(q, k, Canvas((64,)), 4, 5).multiplicity()
    after = pooled_topk(q, shuffled, Canvas((64,)), 4, 5).multiplicity()
    assert torch.equal(after, before[..., order])


def test_within_bounds_the_candidates(generator: torch.Generator) -> None:
    q, k = qk(generator, 32)
    found = PooledTopK(4, Keep(top=3), within=Causal(), own=True).select(q, k, Canvas((32,)))
    times = found.multiplicity()
    i, j = torch.arange(8)[:, None], torch.arange(8)
    assert not times[..., j > i].any()
    assert times[..., i == j].all()
    assert torch.equal(found.count[0, 0].long(), (torch.arange(8)).clamp(max=3) + 1)
    inside = PooledTopK(4, Keep(top=3, forced="inside"), within=Causal(), own=True).select(q, k, Canvas((32,)))
    assert torch.equal(inside.count[0, 0].long(), (torch.arange(8) + 1).clamp(max=3))


@pytest.mark.parametrize("shape,box,dilation", [((7, 6), (2, 3), 1), ((5, 4, 6), (2, 2, 2), 1), ((8, 8), (2, 2), 2)])
def test_visible_groups_closed_form_equals_the_mask(shape: tuple, box: tuple, dilation: int) -> None:
    from glocal.canvas import tile

    canvas = Canvas(shape)
    layout = Layout.of(canvas)
    part = Partition.blocks(canvas, tile(canvas, box, dilation))
    for pattern in (Neighborhood(3), Causal(), Dense(), per_head([Neighborhood(3), Causal()])):
        mask = pattern.mask(layout)  # [heads|1, N, N]
        want = torch.zeros(1, mask.shape[0], part.groups, part.groups, dtype=torch.bool)
        rows = [[int(t) for t in row if t >= 0] for row in part.members[0, 0]]
        for h in range(mask.shape[0]):
            for i, mine in enumerate(rows):
                for j, theirs in enumerate(rows):
                    want[0, h, i, j] = mask[h][mine][:, theirs].any()
        assert torch.equal(visible_groups(pattern, layout, part, part), want)
        plain = Partition(part.members, "same groups, no order")
        assert torch.equal(visible_groups(pattern, layout, plain, plain), want)


def test_visible_groups_by_sample_and_on_a_slice() -> None:
    layout = Layout(Canvas((8,)), Canvas((8,)), q_start=4)
    queries = Partition.blocks(4, 2)
    keys = Partition.chunks(torch.tensor([[0, 2, 8], [0, 7, 8]]))
    want = [[[[True, True], [True, True]]], [[[True, False], [True, True]]]]
    assert visible_groups(Causal(), layout, queries, keys).tolist() == want


def test_one_score_for_all_heads_and_policy(generator: torch.Generator) -> None:
    canvas = Canvas((4, 4), before=4)
    layout = Layout(canvas, canvas, policy={("grid", "before"): "none"})
    q, k = qk(generator, 20)
    part = Partition.blocks(canvas, (2, 2))
    spec = RouteSpec(part, part, Keep(top=5), BlockMean("sum"))
    found = route(q, k, layout, spec)
    times = found.multiplicity()
    assert times.shape == (2, 1, 5, 5)
    assert not times[:, :, 1:, 0].any() and times[:, :, 0].all()


def test_padding_is_no_part_of_a_mean(generator: torch.Generator) -> None:
    q, k = qk(generator, 8)
    layout = Layout(Canvas((8,)), Canvas((8,)), lengths={"grid": torch.tensor([8, 5])})
    spoiled = k.clone()
    spoiled[1, :, 5:] = 1e4
    part = Partition.blocks(8, 2)
    spec = RouteSpec(part, part, Keep(top=4))
    a, b = route(q, k, layout, spec), route(q, spoiled, layout, spec)
    assert torch.equal(a.index, b.index) and torch.equal(a.count, b.count)
    assert a.count[1, 0, 0] == 3  # the last block holds padding only


def test_scores_carry_gradients_if_asked(generator: torch.Generator) -> None:
    q, k = qk(generator, 8)
    q.requires_grad_()
    part = Partition.blocks(8, 2)
    found = route(q, k, Canvas((8,)), RouteSpec(part, part, Keep(top=2), differentiable=True))
    assert found.scores is not None
    found.scores.softmax(-1).square().sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0


def test_from_mask_keeps_repeats() -> None:
    part = Partition.blocks(6, 2)
    times = torch.tensor([[0, 2, 1], [0, 0, 0], [1, 0, 3]])
    found = from_mask(Layout.of(Canvas((6,))), part, part, times)
    assert found.count.tolist() == [[[3, 0, 4]]]
    assert found.index[0, 0, 2].tolist() == [0, 2, 2, 2]
    assert torch.equal(found.multiplicity()[0, 0], times.int())


def test_errors_name_what_is_wrong(generator: torch.Generator) -> None:
    q, k = qk(generator, 8)
    part = Partition.blocks(8, 2)
    spec = RouteSpec(part, part, Keep(top=2))
    with pytest.raises(ValueError, match=r"route: q of shape \(2, 2, 8, 8\) must be \[batch, heads, 9, head size\]"):
        route(q, k, Canvas((9,)), spec)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) must end with 4 query groups and 4 key groups"):
        from_mask(Layout.of(Canvas((8,))), part, part, torch.ones(2, 3))
    with pytest.raises(ValueError, match="within has 3 heads, which do not divide the 2 heads"):
        route(q, k, Canvas((8,)), spec, within=per_head([Causal()] * 3))


def test_scores_are_not_rounded_under_autocast() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 64, 8, generator=g) for _ in range(2))
    part = Partition.blocks(64, 4)
    spec = RouteSpec(part, part, Keep(top=3))
    want = route(q, k, Canvas((64,)), spec)
    with torch.autocast("cpu", torch.bfloat16):
        found = route(q, k, Canvas((64,)), spec)
    assert want.scores is not None and found.scores is not None
    assert torch.equal(found.index, want.index) and torch.equal(found.scores, want.scores)
