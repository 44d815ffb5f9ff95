"""Allocation against brute force, its hulls against their definition, and its behaviour under budgets."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

import pytest
import torch

from glocal.advise.allocate import Items, allocate, bucket_weights, evaluate
from glocal.advise.hull import lower_hulls


def random_items(
    generator: torch.Generator, layers: int = 2, heads: int = 2, buckets: int = 2, methods: int = 4
) -> Items:
    """Sparser methods are faster and err more, with noise."""
    grid = torch.cartesian_prod(torch.arange(layers), torch.arange(heads), torch.arange(buckets))
    share = torch.cat([torch.ones(1), torch.rand(methods - 1, generator=generator) * 0.9])  # of dense time
    time_ = share.double()[None].expand(len(grid), -1) * (1 + 0.1 * torch.rand(len(grid), 1, generator=generator))
    error = torch.rand(len(grid), methods, generator=generator).double() * (1 - share) ** 2
    error = error * torch.rand(len(grid), 1, generator=generator) * 4
    error[:, 0] = 0
    ones = torch.ones_like(error)
    names = ("dense", *(f"m{i}" for i in range(1, methods)))
    return Items(names, grid[:, 0], grid[:, 1], grid[:, 2], error, time_.contiguous(), ones, ones)


def brute(items: Items, weights: torch.Tensor) -> torch.Tensor:
    """Time and error of every choice [choices, 2]."""
    rows = []
    for choice in itertools.product(range(len(items.methods)), repeat=len(items)):
        found = evaluate(items, torch.tensor(choice), weights)
        rows.append((found.time, found.error))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_best_of_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    items = random_items(generator, layers=3, heads=1, buckets=2, methods=4)
    weights = torch.tensor([0.7, 1.6], dtype=torch.float64)
    every = brute(items, weights)
    low, high = float(every[:, 0].min()), items.dense_time
    gaps = []
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        budget = low + share * (high - low) + 1e-9
        found = allocate(items, weights, time_budget=budget)
        best = float(every[every[:, 0] <= budget][:, 1].min())
        assert found.time <= budget * (1 + 1e-9)
        assert found.error >= best - 1e-9
        gaps.append(found.error - best)
        limit = best + 1e-9
        back = allocate(items, weights, error_budget=limit)
        assert back.error <= limit
        assert back.time >= float(every[every[:, 1] <= limit][:, 0].min()) - 1e-9
    worst = float(every[:, 1].max())
    # Whole items do not split, so with six of them a gap of a few per cent of the range may stay.
    assert max(gaps) < 0.06 * worst and gaps[0] < 1e-9 and gaps[-1] < 1e-9


def test_many_items_reach_the_bound_of_the_relaxed_problem(generator: torch.Generator) -> None:
    items = random_items(generator, layers=20, heads=10, buckets=1, methods=6)
    weights = torch.ones(1, dtype=torch.float64)
    budget = 0.5 * items.dense_time
    found = allocate(items, weights, time_budget=budget)
    # Weak duality: for any price the priced optimum bounds the least squared error from below.
    prices = torch.logspace(-4, 2, 400, dtype=torch.float64)
    bound = max(float((items.error + p * items.time).amin(1).sum() - p * budget) for p in prices)
    assert float(found.squared[0]) >= bound - 1e-9
    assert float(found.squared[0]) <= 1.02 * bound


def test_errors_fall_as_time_grows_and_times_as_errors_grow(generator: torch.Generator) -> None:
    items = random_items(generator, layers=6, heads=4, buckets=4, methods=7)
    weights = torch.tensor([0.2, 0.5, 1.0, 3.0], dtype=torch.float64)
    low = float(items.time.min(1).values.sum())
    budgets = torch.linspace(low + 1e-9, items.dense_time, 25, dtype=torch.float64).tolist()
    errors = [allocate(items, weights, time_budget=b).error for b in budgets]
    assert all(b <= a * 1.01 + 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[-1] == 0
    limits = torch.linspace(0, errors[0], 15).tolist()
    times = [allocate(items, weights, error_budget=e).time for e in limits]
    assert all(b <= a * 1.01 for a, b in itertools.pairwise(times))
    assert times[0] <= items.dense_time * (1 + 1e-9)


def test_every_choice_but_the_last_ones_lies_on_the_hull(generator: torch.Generator) -> None:
    items = random_items(generator, layers=4, heads=4, buckets=3, methods=8)
    found = allocate(items, torch.tensor([1.0, 2.0, 3.0]), time_budget=0.6 * items.dense_time)
    hulls = lower_hulls(items.time, items.error)
    assert all(int(found.choice[i]) in hulls.point[i].tolist() for i in range(len(items)))


def test_hulls_are_convex_and_lie_below_all_points(generator: torch.Generator) -> None:
    time_ = torch.rand(200, 9, generator=generator).double()
    error = torch.rand(200, 9, generator=generator).double()
    error[torch.rand(200, 9, generator=generator) < 0.2] = math.inf
    error[:, 0], time_[:, 0] = 0, 1.2
    hulls = lower_hulls(time_, error)
    for price in torch.logspace(-3, 3, 13).tolist():
        best = (error + price * time_).amin(1)
        corner = ((hulls.slope >= price) & (hulls.slope > 0)).sum(1)
        point = hulls.point.gather(1, corner[:, None])
        got = (error + price * time_).gather(1, point)[:, 0]
        assert torch.allclose(got, best, atol=1e-12)
    slope = hulls.slope
    assert bool(((slope[:, :-1] > slope[:, 1:]) | (slope[:, 1:] == 0)).all())


def test_slower_than_dense_is_never_chosen(generator: torch.Generator) -> None:
    items = random_items(generator)
    items.time[:, 1] = items.time[:, 0] * 1.1
    found = allocate(items, torch.ones(2), time_budget=items.dense_time * 2)
    assert not bool((found.choice == 1).any()) and found.error == 0


def test_a_heavy_bucket_stays_dense(generator: torch.Generator) -> None:
    items = random_items(generator, layers=5, heads=4, buckets=2)
    found = allocate(items, torch.tensor([100.0, 1.0]), time_budget=0.75 * items.dense_time)
    assert float(found.squared[0]) < float(found.squared[1])


def test_many_items_take_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    items = random_items(generator, layers=200, heads=200, buckets=5, methods=8)
    assert len(items) == 200_000
    start = time.perf_counter()
    found = allocate(items, torch.rand(5, generator=generator) + 0.1, time_budget=0.5 * items.dense_time)
    assert time.perf_counter() - start < 20  # one or two seconds where nothing else runs
    assert 0.4999 * items.dense_time < found.time <= 0.5 * items.dense_time


def test_budgets_that_cannot_be_are_refused(generator: torch.Generator) -> None:
    items = random_items(generator)
    with pytest.raises(
        ValueError, match=r"time_budget=0 s is below [\d.]+ s, what the fastest methods need; dense needs"
    ):
        allocate(items, torch.ones(2), time_budget=0.0)
    with pytest.raises(ValueError, match="give exactly one"):
        allocate(items, torch.ones(2))
    with pytest.raises(ValueError, match=r"error_budget=-1.0; legal: 0 or more"):
        allocate(items, torch.ones(2), error_budget=-1.0)
    with pytest.raises(ValueError, match="weights has 3 entries; the items have 2 buckets"):
        allocate(items, torch.ones(3), error_budget=1.0)


@dataclass
class Row:
    layer: int
    head: int
    bucket: int
    sample: str
    method: str
    residual: float
    output: float = 0.5
    mass: float = 0.9
    kept: float = 0.25
    kind: str = "self"
    component: str = "transformer"


def test_items_take_the_worst_sample_and_the_mean_over_its_calls() -> None:
    rows = [
        Row(0, 0, 0, "a", "x", 0.1),
        Row(0, 0, 0, "a", "x", 0.3),
        Row(0, 0, 0, "b", "x", 0.2),
        Row(0, 1, 0, "a", "y", 0.4),
        Row(0, -1, 0, "a", "x", 9.0),
    ]
    items = Items.from_records(rows, lambda method, layer, bucket: 1.0 if method == "dense" else 0.5)
    assert items.methods == ("dense", "x", "y") and len(items) == 2
    assert items.error[0].tolist() == pytest.approx([0, (0.01 + 0.09) / 2, math.inf])
    assert items.error[1].tolist() == pytest.approx([0, math.inf, 0.16])
    assert items.kept[0].tolist() == [1.0, 0.25, 1.0]
    other = Items.from_records(rows, lambda *_: 1.0, measure="output")
    assert float(other.error[0, 1]) == pytest.approx(0.25)
    assert items.only(["y"]).methods == ("dense", "y")


def test_items_say_what_is_wrong() -> None:
    one = torch.zeros(1, dtype=torch.long)
    good = torch.tensor([[0.0, 1.0]])
    with pytest.raises(ValueError, match="the first must be 'dense'"):
        Items(("x", "dense"), one, one, one, good, good, good, good)
    with pytest.raises(ValueError, match="error of 'dense' must be 0"):
        Items(("dense", "x"), one, one, one, good + 1, good, good, good)
    with pytest.raises(ValueError, match=r"time has shape \(1, 1\); need \(1, 2\)"):
        Items(("dense", "x"), one, one, one, good, good[:, :1], good, good)
    with pytest.raises(ValueError, match="no records of single heads"):
        Items.from_records([], lambda *_: 1.0)


def test_weights_of_buckets() -> None:
    assert bucket_weights([2.0, 3.0], [0.5, 0.1], [1.0, 2.0]).tolist() == pytest.approx([1.0, 0.6])
    with pytest.raises(ValueError, match="step_weights has 2 entries and lengths 1"):
        bucket_weights([1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="must be positive and finite"):
        bucket_weights([1.0, 0.0], [1.0, 1.0])
