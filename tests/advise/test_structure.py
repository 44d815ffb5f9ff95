"""Merged allocations: their limits, their loss, and rules that say exactly what was chosen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from glocal.advise.allocate import Allocation, Items, allocate, evaluate
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Phase, Recipe
from glocal.advise.rules import allocation_rules, layer_ranges, published_defaults
from glocal.advise.search import within
from glocal.advise.structure import Structure, StructureSpec, simplify

LAYERS, HEADS, BUCKETS = 4, 3, 6
LEVELS = torch.linspace(1, 0, BUCKETS + 1).tolist()
PHASES = [Phase("sigma", low, high) for high, low in itertools.pairwise(LEVELS)]


def make(generator: torch.Generator, methods: int = 20, noise: float = 1.0) -> Items:
    """Errors of a method differ by a factor of up to 1 + noise between items."""
    grid = torch.cartesian_prod(torch.arange(LAYERS), torch.arange(HEADS), torch.arange(BUCKETS))
    share = torch.linspace(1, 0.1, methods).double()
    time = share.expand(len(grid), -1).contiguous()
    error = ((1 - share) ** 2).expand(len(grid), -1) * (
        1 + noise * torch.rand(len(grid), methods, generator=generator).double()
    )
    names = ("dense", *(f"m{i}" for i in range(1, methods)))
    kept = share.expand_as(error).contiguous()
    return Items(names, grid[:, 0], grid[:, 1], grid[:, 2], error, time, kept, kept.sqrt())


WEIGHTS = torch.tensor([0.5, 0.6, 0.8, 1.0, 2.0, 4.0], dtype=torch.float64)


def recipe_of(items: Items, found: Allocation) -> Recipe:
    rules = allocation_rules(items, found, PHASES)
    methods = {name: MethodSpec("dense") for name in items.methods if name != "dense"}
    return Recipe("candidate", methods, rules)


def says(recipe: Recipe, items: Items, choice: torch.Tensor) -> bool:
    """Whether the rules give every item its choice, at both ends of its noise levels."""
    rows = zip(items.layer.tolist(), items.head.tolist(), items.bucket.tolist(), choice.tolist(), strict=True)
    return all(
        recipe.method_at(layer, head, component="transformer", kind="self", branch="cond", sigma=s, progress=None)
        == items.methods[method]
        for layer, head, bucket, method in rows
        for s in (PHASES[bucket].high, PHASES[bucket].low + 1e-6)
    )


@pytest.mark.parametrize("noise", [0.01, 1.0, 20.0])
def test_limits_hold_and_the_time_too(generator: torch.Generator, noise: float) -> None:
    items = make(generator, noise=noise)
    budget = 0.5 * items.dense_time
    first = allocate(items, WEIGHTS, time_budget=budget)
    made = simplify(items, first, WEIGHTS)
    assert made.time <= budget * (1 + 1e-9)
    assert len(made.ranges) <= 4 and sorted(sum(made.ranges, ())) == list(range(BUCKETS))
    assert len(made.methods) <= 12
    assert made.error == pytest.approx(evaluate(items, made.choice, WEIGHTS).error)
    assert made.loss == pytest.approx(made.error / first.error - 1)
    for buckets in made.ranges:
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            rows = (items.layer == layer) & (items.head == head) & torch.isin(items.bucket, torch.tensor(buckets))
            assert len(set(made.choice[rows].tolist())) == 1
    for layer, number in made.whole:
        rows = (items.layer == layer) & torch.isin(items.bucket, torch.tensor(made.ranges[number]))
        assert len(set(made.choice[rows].tolist())) == 1


def test_equal_heads_and_buckets_merge_at_no_loss(generator: torch.Generator) -> None:
    items = make(generator, noise=0.0)
    equal = torch.ones(BUCKETS, dtype=torch.float64)
    made = simplify(items, allocate(items, equal, time_budget=0.5 * items.dense_time), equal)
    # A sum of roots is least where some buckets carry all the error, so equal buckets need not end equal.
    assert len(made.ranges) <= 2 and len(made.whole) == LAYERS * len(made.ranges)
    assert made.loss < 0.02


def test_what_costs_much_stays_apart(generator: torch.Generator) -> None:
    items = make(generator, noise=0.0)
    items.error[items.head == 0] *= 1e4  # this head must stay dense, the others need not
    first = allocate(items, WEIGHTS, time_budget=0.6 * items.dense_time)
    made = simplify(items, first, WEIGHTS)
    assert all((layer, 0) not in made.whole for layer in range(LAYERS)) and made.loss < 0.05
    assert bool((made.choice[items.head == 0] == 0).all())
    assert bool((made.choice[items.head == 1] > 0).any())


def test_without_tolerance_only_what_must_be_is_merged(generator: torch.Generator) -> None:
    items = make(generator, noise=20.0)
    first = allocate(items, WEIGHTS, time_budget=0.5 * items.dense_time)
    free = simplify(items, first, WEIGHTS, StructureSpec(loss=0.0, ranges=BUCKETS, methods=99))
    assert free.loss < 0.01
    few = simplify(items, first, WEIGHTS, StructureSpec(ranges=1, methods=1))
    assert len(few.ranges) == 1 and len(few.methods) == 1
    assert few.error > free.error


def test_an_error_budget_is_kept(generator: torch.Generator) -> None:
    items = make(generator)
    limit = 0.3 * allocate(items, WEIGHTS, time_budget=0.3 * items.dense_time).error
    first = allocate(items, WEIGHTS, error_budget=limit)
    made = simplify(items, first, WEIGHTS, error_budget=limit)
    assert made.error <= limit
    assert made.time <= first.time * 1.2


def test_everything_dense_stays_so(generator: torch.Generator) -> None:
    items = make(generator)
    first = allocate(items, WEIGHTS, error_budget=0.0)
    made = simplify(items, first, WEIGHTS)
    assert isinstance(made, Structure) and made.error == 0 and made.methods == () and made.loss == 0
    assert allocation_rules(items, made, PHASES) == ()


def test_rules_say_the_choice(generator: torch.Generator) -> None:
    items = make(generator, methods=5, noise=20.0)
    random = torch.randint(5, (len(items),), generator=generator)
    for choice in (random, allocate(items, WEIGHTS, time_budget=0.5 * items.dense_time).choice):
        found = evaluate(items, choice, WEIGHTS)
        assert says(recipe_of(items, found), items, choice)


def test_rules_are_few(generator: torch.Generator) -> None:
    items = make(generator, methods=3)
    late = (items.bucket >= 3).long()
    found = evaluate(items, late, WEIGHTS)
    (rule,) = allocation_rules(items, found, PHASES)
    assert (rule.layers, rule.heads, rule.use) == (((0, LAYERS - 1),), "all", "m1")
    assert rule.phase == Phase("sigma", 0.0, LEVELS[3])
    assert rule.expected.kept == pytest.approx(0.55) and rule.expected.time_ratio == pytest.approx(0.55)
    assert rule.expected.mass == pytest.approx(0.55**0.5, abs=1e-6)
    (always,) = allocation_rules(items, evaluate(items, torch.ones_like(late), WEIGHTS), PHASES)
    assert always.phase == Phase()
    some = torch.where((items.layer != 1) & (items.head != 1), late, 0)
    (part,) = allocation_rules(items, evaluate(items, some, WEIGHTS), PHASES)
    assert part.layers == ((0, 0), (2, 3)) and part.heads == (0, 2)


def test_rules_of_a_simplified_allocation_say_it(generator: torch.Generator) -> None:
    items = make(generator, noise=3.0)
    made = simplify(items, allocate(items, WEIGHTS, time_budget=0.5 * items.dense_time), WEIGHTS)
    recipe = recipe_of(items, made)
    assert says(recipe, items, made.choice)
    assert len(recipe.dumps()) < 40_000


def test_ranges_with_gaps_are_refused(generator: torch.Generator) -> None:
    items = make(generator, methods=3)
    found = evaluate(items, torch.zeros(len(items), dtype=torch.long), WEIGHTS)
    with pytest.raises(ValueError, match="buckets has 2 ranges; the items have 6 buckets"):
        allocation_rules(items, found, PHASES[:2])
    with pytest.raises(ValueError, match=r"buckets\[1\] begins at sigma .* without gaps"):
        allocation_rules(items, found, PHASES[::-1])
    with pytest.raises(ValueError, match=r"buckets\[5\] is empty"):
        allocation_rules(items, found, [*PHASES[:5], replace(PHASES[5], low=PHASES[5].high)])


def test_published_settings() -> None:
    found = {p.name: p for p in published_defaults((30, 48, 80), 40)}
    wan = found["radial, Wan 2.1"]
    assert wan.method.params == {"form": "blocks", "decay": 0.2, "model": "wan"} and wan.method.block == (128, 128)
    assert wan.rules[0].layers == ((1, 39),) and wan.rules[0].phase == Phase("progress", 0.24, 1.0)
    gna = found["gna, HunyuanVideo"]
    assert [round(w["fraction"] * n) for w, n in zip(gna.method.params["window"], (30, 48, 80), strict=True)] == [
        18,
        24,
        24,
    ]
    assert gna.rules[0].use == gna.method.id
    assert published_defaults((64, 64), 12) == ()
    assert all(p.rules[0].layers == ((0, 0),) for p in published_defaults((4, 4, 4), 1))


def test_a_spec_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="legal: loss from 0, ranges and methods from 1"):
        StructureSpec(ranges=0)


def test_layers_as_ranges() -> None:
    assert layer_ranges([0, 1, 2, 5, 7, 8]) == ((0, 2), (5, 5), (7, 8))
    assert layer_ranges([]) == ()


def test_heads_merge_where_further_methods_cost_more_than_they_save(generator: torch.Generator) -> None:
    items, weights, budget = make(generator), WEIGHTS, 0.5 * LAYERS * HEADS * BUCKETS
    apart = simplify(items, allocate(items, weights, time_budget=budget), weights)
    assert items.split_time(apart.choice) == 0
    dear = replace(items, split=(0.2 * items.dense_time,) * items.buckets)
    made = within(dear, weights, budget)
    assert made.time + dear.split_time(made.choice) <= budget * (1 + 1e-9)
    assert apart.time + dear.split_time(apart.choice) > budget
    layers = {(layer, bucket) for layer, bucket in zip(items.layer.tolist(), items.bucket.tolist(), strict=True)}
    ways = [len(made.choice[(items.layer == a) & (items.bucket == b)].unique()) for a, b in layers]
    assert set(ways) == {1}
    with pytest.raises(ValueError, match="split has 1 entries"):
        replace(items, split=(1.0,))


def test_time_of_further_methods_is_counted_once_a_call() -> None:
    layer, head, bucket = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]])
    table = torch.zeros(6, 3, dtype=torch.float64)
    items = Items(("dense", "a", "b"), layer, head, bucket, table, table + 1, table, table, split=(2.0, 5.0))
    assert items.split_time(torch.tensor([0, 1, 2, 1, 1, 2])) == 2 * 2.0 + 5.0
    assert items.split_time(torch.tensor([1, 1, 1, 0, 0, 0])) == 0
