"""Which method at which layer, head and noise level: least predicted error in a time, or least time under an error.

The predicted end-to-end error is ``E = sum_b w_b sqrt(S_b)``, S_b the sum of the squared errors of bucket b's items.
For fixed prices of squared error the choice is a multiple-choice knapsack, solved by one price of time over each
item's lower hull. The roots are handled by tangents: a root lies below each of its tangents, so moving them to the
solution and solving again never makes E larger. Several starts, since a sum of roots has several valleys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from glocal.advise.hull import Hulls, lower_hulls

APART = 100_000  # more layers than any model has
_TURNS = 40  # tangents moved at most so often; a handful is usual
_ROUNDS = 64  # passes that use up what the price of time left over
_ROUNDING = 1e-12  # sums of the same times in another order differ by so much


class Measured(Protocol):
    """One measurement of a method at one head: what `advise.probe.ProbeRecord` holds."""

    @property
    def layer(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def bucket(self) -> int: ...
    @property
    def sample(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def mass(self) -> float: ...
    @property
    def output(self) -> float: ...
    @property
    def residual(self) -> float: ...
    @property
    def kept(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def component(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Items:
    """What can be chosen. Rows are items (layer, head, bucket), columns methods, column 0 is "dense".

    methods: ids. layer, head, bucket [items] int64; the layers of the second and later `groups` (component, kind of
    site) are counted on from multiples of `APART`. error [items, methods]: squared error, 0 in column 0, inf where a
    method was not measured. time [items, methods]: seconds of all calls of the item in a run. kept, mass
    [items, methods]: share of pairs kept and of attention weight kept. split [buckets]: seconds that every further
    method costs in the calls of one layer whose heads run several; () where it costs nothing. `allocate` chooses item
    by item and leaves it out; `structure.simplify` merges heads by it.
    """

    methods: tuple[str, ...]
    layer: Tensor
    head: Tensor
    bucket: Tensor
    error: Tensor
    time: Tensor
    kept: Tensor
    mass: Tensor
    groups: tuple[tuple[str, str], ...] = (("transformer", "self"),)
    split: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods or self.methods[0] != "dense":
            raise ValueError(f"methods={self.methods!r}; the first must be 'dense'.")
        shape = (len(self.layer), len(self.methods))
        for name in ("error", "time", "kept", "mass"):
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; need {shape}, items x methods.")
        if bool(self.error[:, 0].any()):
            raise ValueError("error of 'dense' must be 0 in every item.")
        if bool((self.error < 0).any() | self.error.isnan().any()):
            raise ValueError("error holds negative values or NaN; squared errors are 0 or more, inf if not measured.")
        if self.split and len(self.split) != self.buckets:
            raise ValueError(f"split has {len(self.split)} entries; the items have {self.buckets} buckets.")
        if not bool(self.time.isfinite().all() & (self.time >= 0).all()):
            raise ValueError("time holds negative or infinite values or NaN.")

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        return int(self.bucket.max()) + 1

    @property
    def dense_time(self) -> float:
        """Time of all items left dense."""
        return float(self.time[:, 0].double().sum())

    def split_time(self, choice: Tensor) -> float:
        """Seconds that a choice [items] costs because layers run several methods in one call."""
        if not self.split:
            return 0.0
        calls = torch.stack([self.layer, self.bucket, choice], 1).unique(dim=0)[:, :2]  # one row a method of a call
        calls, ways = calls.unique(dim=0, return_counts=True)
        return float(((ways - 1) * torch.tensor(self.split, dtype=torch.float64)[calls[:, 1]]).sum())

    @staticmethod
    def from_records(
        records: Iterable[Measured],
        time: Callable[[str, int, int], float],
        *,
        measure: Literal["residual", "output"] = "residual",
    ) -> Items:
        """From probe records. time(method or "dense", layer, bucket): seconds of one head over the bucket's calls.

        The squared error of a method at an item is the mean over steps and guidance branches of a sample, of the worst
        sample; so a method must be good on all of them. measure: error of what reaches the residual stream, or of the
        attention output. Records of head -1 (sums over heads) are passed over.
        """
        known = [r for r in records if r.head >= 0]
        groups = tuple(sorted({(r.component, r.kind) for r in known}))
        first = {group: APART * number for number, group in enumerate(groups)}
        sums: dict[tuple[int, int, int], dict[str, dict[str, list[Measured]]]] = {}
        for record in known:
            layer = first[record.component, record.kind] + record.layer
            of_item = sums.setdefault((layer, record.head, record.bucket), {})
            of_item.setdefault(record.method, {}).setdefault(record.sample, []).append(record)
        if not sums:
            raise ValueError("there are no records of single heads to allocate by.")
        keys = sorted(sums)
        methods = ("dense", *sorted({name for of_item in sums.values() for name in of_item}))
        error = torch.full((len(keys), len(methods)), math.inf, dtype=torch.float64)
        kept, mass = torch.ones_like(error), torch.ones_like(error)
        error[:, 0] = 0
        for row, key in enumerate(keys):
            for name, of_method in sums[key].items():
                column = methods.index(name)
                everything = [r for group in of_method.values() for r in group]
                error[row, column] = max(_mean(getattr(r, measure) ** 2 for r in group) for group in of_method.values())
                kept[row, column] = _mean(r.kept for r in everything)
                mass[row, column] = _mean(r.mass for r in everything)
        per_place = {(name, k[0], k[2]): time(name, k[0], k[2]) for name in methods for k in keys}
        times = torch.tensor([[per_place[n, k[0], k[2]] for n in methods] for k in keys], dtype=torch.float64)
        layer, head, bucket = torch.tensor(keys).T
        return Items(methods, layer, head, bucket, error, times, kept, mass, groups)

    def only(self, methods: Sequence[str]) -> Items:
        """The same items with fewer methods; "dense" always stays."""
        columns = [i for i, name in enumerate(self.methods) if i == 0 or name in methods]
        return replace(
            self,
            methods=tuple(self.methods[i] for i in columns),
            **{name: getattr(self, name)[:, columns] for name in ("error", "time", "kept", "mass")},
        )


@dataclass(frozen=True, eq=False)
class Allocation:
    """choice [items]: column of the method. time: seconds of all items. error: predicted end to end.

    squared [buckets]: S_b. tangent [buckets]: price of squared error there, w_b / (2 sqrt(S_b)). price: of a second, in
    predicted error.
    """

    choice: Tensor
    time: float
    error: float
    squared: Tensor
    tangent: Tensor
    price: float


def bucket_weights(
    step_weights: Sequence[float], lengths: Sequence[float], coherence: Sequence[float] | float = 1.0
) -> Tensor:
    """w_b [buckets]: step weight u_b x summed length of the bucket's steps in sigma x coherence of heads and layers."""
    if len(step_weights) != len(lengths):
        raise ValueError(f"step_weights has {len(step_weights)} entries and lengths {len(lengths)}; one each a bucket.")
    together = torch.tensor(coherence, dtype=torch.float64)
    weights = torch.tensor(step_weights, dtype=torch.float64) * torch.tensor(lengths, dtype=torch.float64) * together
    if not bool((weights > 0).all() & weights.isfinite().all()):
        raise ValueError(f"weights of buckets are {weights.tolist()}; every one must be positive and finite.")
    return weights


def evaluate(items: Items, choice: Tensor, weights: Tensor, *, price: float = 0.0) -> Allocation:
    """Time and predicted error of a given choice [items]; price is passed through."""
    at = choice[:, None]
    squared = torch.zeros(items.buckets, dtype=torch.float64)
    squared.index_add_(0, items.bucket, items.error.double().gather(1, at)[:, 0])
    weights = weights.double()
    error = float((weights * squared.sqrt()).sum())
    # A bucket without error would make its tangent infinite.
    tangent = weights / (2 * squared.clamp(min=float(squared.max()) * 1e-9 + 1e-300).sqrt())
    time = float(items.time.double().gather(1, at).sum())
    return Allocation(choice, time, error, squared, tangent, price)


def allocate(
    items: Items, weights: Tensor, *, time_budget: float | None = None, error_budget: float | None = None
) -> Allocation:
    """The choice of least predicted error within `time_budget` seconds, or of least time within `error_budget`.

    weights [buckets], see `bucket_weights`. Exactly one budget. For an allocation by another error, give items that
    carry it. Raises ValueError for a time below what the fastest methods need.
    """
    if (time_budget is None) == (error_budget is None):
        raise ValueError(f"time_budget={time_budget!r} and error_budget={error_budget!r}; give exactly one.")
    if len(weights) != items.buckets:
        raise ValueError(f"weights has {len(weights)} entries; the items have {items.buckets} buckets.")
    weights = weights.double()
    paths = _Paths(items)
    if time_budget is not None:
        if time_budget < paths.least_time * (1 - 1e-9):
            raise ValueError(
                f"time_budget={time_budget:.6g} s is below {paths.least_time:.6g} s, what the fastest methods need; "
                f"dense needs {items.dense_time:.6g} s."
            )
    elif error_budget is not None and not error_budget >= 0:
        raise ValueError(f"error_budget={error_budget!r}; legal: 0 or more.")
    best: Allocation | None = None
    for start in _starts(items, weights, paths):
        found = _descend(items, weights, paths, start, time_budget, error_budget)
        if best is None or _rank(found, time_budget is not None) < _rank(best, time_budget is not None):
            best = found
    assert best is not None
    return best


class _Paths:
    """The hull edges of every bucket in falling order of slope, with their running sums of time and squared error."""

    def __init__(self, items: Items) -> None:
        self.hulls: Hulls = lower_hulls(items.time, items.error)
        first = self.hulls.point[:, :1]
        self.fast_time = items.time.double().gather(1, first)[:, 0]
        fast_error = items.error.double().gather(1, first)[:, 0]
        self.least_time = float(self.fast_time.sum())
        self.falling, self.time, self.fall = [], [], []  # per bucket; slopes are stored with a minus, so that they rise
        self.slopes = slope = self.hulls.slope
        zero = slope.new_zeros(1)
        start = slope.new_zeros(items.buckets)
        start.index_add_(0, items.bucket, fast_error)
        self.worst = start  # S_b with everything as fast as can be
        for bucket in range(items.buckets):
            rows = items.bucket == bucket
            edges = slope[rows].flatten()
            real = edges > 0
            edges, order = edges[real].sort(descending=True)
            self.falling.append(-edges)
            for sums, part in ((self.time, self.hulls.rise), (self.fall, self.hulls.fall)):
                sums.append(torch.cat([zero, part[rows].flatten()[real][order].cumsum(0)]))

    def at(self, price: float, tangent: Tensor) -> tuple[float, Tensor]:
        """Time and S_b when every edge is taken whose saving is worth its time."""
        total, squared = self.least_time, self.worst.clone()
        least = price / tangent  # [buckets]
        for bucket, falling in enumerate(self.falling):
            taken = int(torch.searchsorted(falling, -least[bucket], right=True))
            total += float(self.time[bucket][taken])
            squared[bucket] -= self.fall[bucket][taken]
        return total, squared.clamp(min=0)

    def prices(self, tangent: Tensor) -> tuple[float, float]:
        """Prices of time that take no edge, and all edges."""
        ends = [(-float(e[0] * t), -float(e[-1] * t)) for e, t in zip(self.falling, tangent, strict=True) if e.numel()]
        if not ends:
            return 1.0, 1.0
        return max(high for high, _ in ends) * 2, min(low for _, low in ends) / 2

    def corners(self, price: float, tangent: Tensor, bucket: Tensor) -> Tensor:
        """Corner of every item at a price [items]."""
        least = (price / tangent)[bucket]  # [items], the very numbers of `at`: a price may lie on an edge
        return ((self.slopes >= least[:, None]) & (self.slopes > 0)).sum(1)

    def choice(self, corner: Tensor) -> Tensor:
        """Method of every item at its corner."""
        return self.hulls.point.gather(1, corner[:, None])[:, 0]


def _starts(items: Items, weights: Tensor, paths: _Paths) -> list[Tensor]:
    """Tangents to begin with: of equal shares, as if roots were squares, and one for each bucket kept nearly dense."""
    scale = paths.worst.clamp(min=float(paths.worst.max()) * 1e-12 + 1e-300)
    plain = weights / (2 * scale.sqrt())
    starts = [plain, weights**2]
    for bucket in range(items.buckets):
        guarded = plain.clone()
        guarded[bucket] *= 1e4
        starts.append(guarded)
    if items.buckets == 1:
        return starts[:1]
    return starts


def _descend(
    items: Items, weights: Tensor, paths: _Paths, tangent: Tensor, time_budget: float | None, error_budget: float | None
) -> Allocation:
    """Move tangents until nothing improves, then spend what the price left over."""
    floor = float(paths.worst.max()) * 1e-12 + 1e-300
    seen: tuple[float, Tensor, float] | None = None  # rank, tangent, price
    for _ in range(_TURNS):
        price = _price(weights, paths, tangent, time_budget, error_budget)
        total, squared = paths.at(price, tangent)
        rank = float((weights * squared.sqrt()).sum()) if time_budget is not None else total
        if seen is not None and rank >= seen[0] * (1 - 1e-9):
            break
        seen = (rank, tangent, price)
        tangent = weights / (2 * squared.clamp(min=floor).sqrt())
    assert seen is not None
    _, tangent, price = seen
    corner = paths.corners(price, tangent, items.bucket)
    if time_budget is not None:
        corner = _spend(items, paths, corner, tangent, time_budget)
    else:
        assert error_budget is not None
        corner = _save(items, weights, paths, corner, tangent, error_budget)
    return evaluate(items, paths.choice(corner), weights, price=price)


def _price(
    weights: Tensor, paths: _Paths, tangent: Tensor, time_budget: float | None, error_budget: float | None
) -> float:
    """The least price within the time, or the largest within the error (bisection on logarithms)."""
    high, low = paths.prices(tangent)

    def fits(price: float) -> bool:
        total, squared = paths.at(price, tangent)
        if time_budget is not None:
            return total <= time_budget * (1 + _ROUNDING)
        assert error_budget is not None
        return float((weights * squared.sqrt()).sum()) > error_budget

    # With a time, prices above the answer fit; with an error, prices above it are too coarse: both fall to one border.
    if fits(low):
        return low
    upper, lower = math.log(high), math.log(low)
    for _ in range(60):
        middle = (upper + lower) / 2
        upper, lower = (middle, lower) if fits(math.exp(middle)) else (upper, middle)
    return math.exp(upper if time_budget is not None else lower)


def _spend(items: Items, paths: _Paths, corner: Tensor, tangent: Tensor, budget: float) -> Tensor:
    """Take the next edges that still fit the time, those that save most for their time first."""
    left = budget * (1 + _ROUNDING) - paths.least_time - float(_walked(paths.hulls.rise, corner).sum())
    for _ in range(_ROUNDS):
        rise = paths.hulls.rise.gather(1, corner[:, None])[:, 0]
        merit = paths.slopes.gather(1, corner[:, None])[:, 0] * tangent[items.bucket]
        fits = ((rise > 0) & (rise <= left)).nonzero()[:, 0]
        if not fits.numel():
            break
        fits = fits[merit[fits].argsort(descending=True)]
        sums = rise[fits].cumsum(0)
        taken = fits[sums <= left]
        corner = corner.clone()
        corner[taken] += 1
        left -= float(rise[taken].sum())
    return corner


def _save(items: Items, weights: Tensor, paths: _Paths, corner: Tensor, tangent: Tensor, budget: float) -> Tensor:
    """Undo the last edges where the error still fits, those that cost most time for their saving first."""
    squared = paths.worst.clone().index_add_(0, items.bucket, -_walked(paths.hulls.fall, corner))
    for _ in range(_ROUNDS):
        last = (corner - 1).clamp(min=0)[:, None]
        fall = torch.where(corner > 0, paths.hulls.fall.gather(1, last)[:, 0], torch.inf)
        cost = paths.slopes.gather(1, last)[:, 0] * tangent[items.bucket]
        alone = squared[None].expand(len(items), -1).clone()  # [items, buckets]
        alone.scatter_add_(1, items.bucket[:, None], fall[:, None])
        fits = ((alone.clamp(min=0).sqrt() * weights).sum(1) <= budget).nonzero()[:, 0]
        if not fits.numel():
            break
        fits = fits[cost[fits].argsort()]
        more = torch.zeros(len(fits), items.buckets, dtype=torch.float64)
        more.scatter_(1, items.bucket[fits][:, None], fall[fits][:, None])
        sums = squared + more.cumsum(0)
        count = int(((sums.clamp(min=0).sqrt() * weights).sum(1) <= budget).sum())  # rising, so a prefix
        taken = fits[:count]
        corner = corner.clone()
        corner[taken] -= 1
        squared = sums[count - 1]
    return corner


def _walked(part: Tensor, corner: Tensor) -> Tensor:
    """Sum of the first `corner` edges of every item [items]."""
    return torch.where(torch.arange(part.shape[1])[None] < corner[:, None], part, 0).sum(1)


def _rank(found: Allocation, by_error: bool) -> tuple[float, float]:
    return (found.error, found.time) if by_error else (found.time, found.error)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known)
