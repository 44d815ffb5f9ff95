from __future__ import annotations

import pytest
import torch

from glocal.canvas import Canvas, Layout, raster
from glocal.patterns import Causal, Neighborhood
from glocal.patterns.base import Dense, Pattern
from glocal.patterns.runs import runs_see, split_run
from glocal.plan.build import PlanSpec, plan


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 4, 5)])
def test_a_run_is_its_boxes(shape: tuple[int, ...]) -> None:
    size = int(torch.tensor(shape).prod())
    index = torch.arange(size).reshape(shape)
    for first in range(size):
        for stop in range(first, size + 1):
            boxes = split_run(first, stop, shape)
            found = [int(t) for box in boxes for t in index[tuple(slice(a, b) for a, b in box)].flatten()]
            assert sorted(found) == list(range(first, stop))


@pytest.mark.parametrize("shape", [(23,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("pattern", [Neighborhood(3), Causal(), Dense(), Neighborhood(2, border="clip")])
def test_equals_the_mask(shape: tuple[int, ...], block: int, pattern: Pattern) -> None:
    canvas = Canvas(shape)
    rows, columns = (raster(canvas, b).gather.reshape(-1, b) for b in (block, 5))
    mask = pattern.mask(Layout.of(canvas))[0]
    found = runs_see(pattern.terms(shape, None) or (), shape, rows, columns)
    assert found is not None
    for i, mine in enumerate(rows):
        for j, theirs in enumerate(columns):
            seen = mask[mine[mine >= 0]][:, theirs[theirs >= 0]]
            assert bool(found[0][i, j]) == bool(seen.any())
            assert not found[1][i, j] or seen.all()
    if isinstance(pattern, Dense):
        assert found[1].all()


def test_what_is_no_run_is_left_alone() -> None:
    terms = Dense().terms((6,), None)
    assert runs_see(terms, (6,), torch.tensor([[0, 2]]), torch.tensor([[0, 1]])) is None
    assert runs_see(terms, (6,), torch.tensor([[1, 0]]), torch.tensor([[0, 1]])) is None
    found = runs_see(terms, (6,), torch.tensor([[-1, -1], [4, -1]]), torch.tensor([[0, 1]]))
    assert found is not None and found[0].tolist() == [[False], [True]]


@pytest.mark.parametrize("pattern", [Neighborhood(3), Causal(), Neighborhood(3) & Causal(), ~Causal()])
def test_plans_of_raster_blocks(pattern: Pattern) -> None:
    canvas = Canvas((3, 4, 5))
    order = raster(canvas, 8)
    found = plan(pattern, canvas, PlanSpec(8, 8, order, order))
    assert torch.equal(found.dense_counts()[0].bool(), pattern.mask(Layout.of(canvas)))
