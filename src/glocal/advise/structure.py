"""An allocation with less detail: few step ranges, heads of a layer alike where that costs little, few methods.

Plan memory, captured graphs and readers all want few distinct rules. Each merge is judged by what it adds to the priced
sum of squared error and time at the allocation (its tangent): that is the change of the predicted error at equal time,
to first order. What comes out is allocated again and evaluated with the true prediction; where that says more than
was planned, less is merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from glocal.advise.allocate import Allocation, Items, allocate, evaluate

_BACKING_OFF = (1.0, 0.5, 0.2, 0.0)  # shares of the loss tried: first-order losses may be far too small


@dataclass(frozen=True)
class StructureSpec:
    """loss: share of the predicted error that merging heads may add, and again merging step ranges. ranges, methods:
    most step ranges and distinct methods (dense not counted).
    """

    loss: float = 0.02
    ranges: int = 4
    methods: int = 12

    def __post_init__(self) -> None:
        if self.loss < 0 or self.ranges < 1 or self.methods < 1:
            raise ValueError(f"{self}; legal: loss from 0, ranges and methods from 1.")


@dataclass(frozen=True, eq=False)
class Structure(Allocation):
    """The allocation after merging. ranges: buckets of each step range, noisiest first. whole: (layer, range) whose
    heads are alike by merging. methods: those in use, dense left out. loss: share by which the predicted error grew
    over the allocation without structure (negative where merging happened to find a better one).
    """

    ranges: tuple[tuple[int, ...], ...]
    whole: tuple[tuple[int, int], ...]
    methods: tuple[str, ...]
    loss: float


def simplify(
    items: Items,
    allocation: Allocation,
    weights: Tensor,
    spec: StructureSpec | None = None,
    *,
    error_budget: float | None = None,
) -> Structure:
    """Merge an allocation and choose again, in the same time, or within `error_budget` in the least time.

    Buckets are numbered from the noisiest, without gaps. Raises ValueError if the merged problem cannot keep the
    budget.
    """
    spec = StructureSpec() if spec is None else spec
    best: Structure | None = None
    for share in _BACKING_OFF:
        found = _merge(items, allocation, weights.double(), spec, share * spec.loss * allocation.error, error_budget)
        if found is None:
            continue
        if best is None or (found.error, found.time) < (best.error, best.time):
            best = found
        if _within_loss(found, allocation, spec, error_budget):
            return found
    if best is None:
        raise ValueError(
            f"with at most {spec.ranges} step ranges and {spec.methods} methods no choice takes "
            f"{allocation.time:.6g} s or less; allow more of them, or more time."
        )
    return best  # what the limits on ranges and methods force costs more than the loss aimed at


def _within_loss(found: Structure, first: Allocation, spec: StructureSpec, error_budget: float | None) -> bool:
    """Whether merging heads and ranges cost no more than planned: in error, or in time where the error is given."""
    if error_budget is None:
        return found.error <= first.error * (1 + 2 * spec.loss)
    return found.time <= first.time * (1 + 2 * spec.loss)


def _merge(
    items: Items,
    allocation: Allocation,
    weights: Tensor,
    spec: StructureSpec,
    allowed: float,
    error_budget: float | None,
) -> Structure | None:
    """Merge while first-order losses stay within `allowed`, in units of predicted error, and choose again.

    None where even the fastest choice of the merged heads and ranges takes longer than the allocation.
    """
    cost = _priced(items, allocation)
    ranges, range_of = _merge_ranges(items, cost, spec.ranges, allowed)
    whole = _merge_heads(items, cost, range_of, (allowed, allocation.price))
    group, names = _groups(items, range_of, whole)
    kept = _few_methods(_sum(cost, group, len(names)), spec.methods, allocation.choice.tolist())
    smaller = items.only([items.methods[i] for i in kept])
    if error_budget is None:
        if _least_time(smaller, group, len(names)) > allocation.time * (1 + 1e-9):
            return None
        found = _again(smaller, weights, allocation, group, len(names), allocation.time)
    else:
        found = _within(smaller, weights, allocation, group, len(names), error_budget)
    choice = torch.tensor(kept)[found.choice]
    final = evaluate(items, choice, weights, price=allocation.price)
    loss = final.error / allocation.error - 1 if allocation.error > 0 else 0.0
    used = tuple(items.methods[i] for i in sorted(set(choice.tolist())) if i)
    return Structure(**vars(final), ranges=ranges, whole=tuple(sorted(whole)), methods=used, loss=loss)


def _priced(items: Items, allocation: Allocation) -> Tensor:
    """Squared error and time of every item and method in units of predicted error [items, methods]."""
    return items.error.double() * allocation.tangent[items.bucket][:, None] + allocation.price * items.time.double()


def _sum(cost: Tensor, group: Tensor, groups: int) -> Tensor:
    return cost.new_zeros(groups, cost.shape[1]).index_add_(0, group, cost)


def _loss(parts: Tensor, whole: Tensor) -> Tensor:
    """What choosing once for all parts adds; parts [..., n, methods] -> [...]; whole is their sum."""
    return whole.amin(-1) - parts.amin(-1).sum(-1)


def _merge_ranges(items: Items, cost: Tensor, most: int, allowed: float) -> tuple[tuple[tuple[int, ...], ...], Tensor]:
    """Join neighbouring buckets while there are too many or it costs little; ranges, and the range of every bucket."""
    places, place = torch.unique(torch.stack([items.layer, items.head]), dim=1, return_inverse=True)
    ranges: list[tuple[int, ...]] = [(b,) for b in range(items.buckets)]
    parts = []
    for bucket in range(items.buckets):
        rows = items.bucket == bucket
        parts.append(_sum(cost[rows], place[rows], places.shape[1]))  # [places, methods]
    spent = 0.0
    while len(ranges) > 1:
        losses = [float(_loss(torch.stack([a, b], 1), a + b).sum()) for a, b in pairwise(parts)]
        at = min(range(len(losses)), key=lambda i: losses[i])
        if len(ranges) <= most and spent + losses[at] > allowed:
            break
        spent += losses[at]
        ranges[at : at + 2] = [ranges[at] + ranges[at + 1]]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    range_of = torch.zeros(items.buckets, dtype=torch.long)
    for number, buckets in enumerate(ranges):
        range_of[list(buckets)] = number
    return tuple(ranges), range_of


def _merge_heads(items: Items, cost: Tensor, range_of: Tensor, limits: tuple[float, float]) -> set[tuple[int, int]]:
    """(layer, range) whose heads shall be alike: those that pay by the time of their further methods, then the cheapest
    first, as long as all together cost little. limits: what they may add to the predicted error, and the price of time.
    """
    allowed, price = limits
    places = torch.stack([items.layer, range_of[items.bucket], items.head])
    places, group = torch.unique(places, dim=1, return_inverse=True)
    single = _sum(cost, group, places.shape[1])  # [layers * ranges * heads, methods]
    keys, group = torch.unique(places[:2], dim=1, return_inverse=True)
    whole = _sum(single, group, keys.shape[1])  # [layers * ranges, methods]
    apart = torch.zeros_like(whole[:, 0]).index_add_(0, group, single.amin(1))
    loss = whole.amin(1) - apart
    if items.split:
        used = torch.zeros_like(whole).index_put_((group, single.argmin(1)), torch.ones((), dtype=whole.dtype))
        each = torch.zeros(int(range_of.max()) + 1, dtype=whole.dtype)
        each.index_add_(0, range_of, torch.tensor(items.split, dtype=whole.dtype))
        loss = loss - price * (used.sum(1) - 1) * each[keys[1]]
    loss, order = loss.sort()
    count = int((loss.clamp(min=0).cumsum(0) <= allowed * (1 + 1e-12)).sum())
    return {(int(keys[0, i]), int(keys[1, i])) for i in order[:count]}


def _groups(items: Items, range_of: Tensor, whole: set[tuple[int, int]]) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Group of every item [items]: (layer, range, head), head -1 where heads are merged."""
    ranges = range_of[items.bucket]
    keys = [
        (layer, number, -1 if (layer, number) in whole else head)
        for layer, number, head in zip(items.layer.tolist(), ranges.tolist(), items.head.tolist(), strict=True)
    ]
    names = sorted(set(keys))
    where = {key: i for i, key in enumerate(names)}
    return torch.tensor([where[key] for key in keys]), names


def _few_methods(cost: Tensor, most: int, chosen: list[int]) -> list[int]:
    """Columns to keep: those chosen before and those chosen by price, less again and again the one whose loss is least.
    Dense (0) always stays.
    """
    kept = sorted({0, *chosen, *cost.argmin(1).tolist()})
    while len(kept) - 1 > most:
        totals = {i: float(cost[:, [k for k in kept if k != i]].amin(1).sum()) for i in kept if i}
        kept.remove(min(totals, key=lambda i: totals[i]))
    return kept


def _again(items: Items, weights: Tensor, first: Allocation, group: Tensor, groups: int, budget: float) -> Allocation:
    """Allocate whole groups within a time; the tangent moves until the predicted error falls no more."""
    best: Allocation | None = None
    tangent = first.tangent
    for _ in range(8):
        # One bucket of priced errors: its root is monotone, so the least sum is the least root.
        merged = _merged(items, tangent, group, groups)
        choice = allocate(merged, torch.ones(1, dtype=torch.float64), time_budget=budget).choice[group]
        found = evaluate(items, choice, weights)
        if best is not None and found.error >= best.error * (1 - 1e-9):
            break
        best, tangent = found, found.tangent
    assert best is not None
    return best


def _within(items: Items, weights: Tensor, first: Allocation, group: Tensor, groups: int, limit: float) -> Allocation:
    """The least time whose allocation of whole groups stays within an error (bisection)."""
    low, high = _least_time(items, group, groups), items.dense_time
    best = _again(items, weights, first, group, groups, high)
    for _ in range(30):
        middle = (low + high) / 2
        found = _again(items, weights, first, group, groups, middle)
        if found.error <= limit:
            best, high = found, middle
        else:
            low = middle
    return best


def _least_time(items: Items, group: Tensor, groups: int) -> float:
    """Seconds of the fastest choice of whole groups."""
    return float(_sum(items.time.double(), group, groups).amin(1).sum())


def _merged(items: Items, tangent: Tensor, group: Tensor, groups: int) -> Items:
    """Groups as items of one bucket, their squared errors priced by bucket."""
    nothing = torch.zeros(groups, dtype=torch.long)
    priced = items.error.double() * tangent[items.bucket][:, None]
    sizes = torch.bincount(group, minlength=groups)[:, None]
    return Items(
        items.methods,
        nothing,
        torch.arange(groups),
        nothing,
        _sum(priced, group, groups),
        _sum(items.time.double(), group, groups),
        _sum(items.kept.double(), group, groups) / sizes,
        _sum(items.mass.double(), group, groups) / sizes,
    )
