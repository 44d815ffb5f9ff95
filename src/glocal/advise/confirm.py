"""Forecast replaced by measurement: the distinct calls of a recipe, timed beside dense as their heads are dealt.

A recipe's layers and step ranges have few ways to deal heads to methods; each of them is one plan of a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.attach import attach as attach_method
from glocal.adapt.records import Core, Site, SiteCall
from glocal.advise.objective import Objective
from glocal.advise.preflight import AdviceError, Inside
from glocal.advise.recipe import Recipe
from glocal.advise.timing import Times, mixture
from glocal.advise.weights import Bucket
from glocal.advise.workload import Sample
from glocal.measure.timers import compare_paired

MOST = 12  # distinct calls timed; of further ones, which are the rarest, the forecast stands

Deal = tuple[tuple[str, tuple[int, ...]], ...]  # methods and "dense", each with its heads


@dataclass(frozen=True)
class ConfirmedCall:
    """One way to deal the heads of a call, to `ways` methods. calls: how many calls of a run are dealt so. Seconds of
    one such call; the forecast is over the dense call beside it, as machines are faster at one time than at another.
    """

    words: str
    calls: int
    forecast: float
    measured: float
    ways: int = 1


@dataclass(frozen=True)
class Confirmed:
    """calls: the timed ones. dense: seconds of a dense call beside them. others: calls of a run that were not timed
    (dense ones among them), and what they take over as many dense ones by forecast.
    """

    calls: tuple[ConfirmedCall, ...]
    dense: float
    others: int
    others_ratio: float

    def ratio(self, of: str = "measured") -> float:
        """Attention time of a run over dense; of: "measured" or "forecast"."""
        spent = sum(c.calls * getattr(c, of) for c in self.calls) / self.dense + self.others * self.others_ratio
        return spent / (sum(c.calls for c in self.calls) + self.others)


def deals(recipe: Recipe, sites: Sequence[Site], buckets: Sequence[Bucket], tokens: int) -> Counter[Deal]:
    """The ways a recipe deals heads, and how many calls of a run (of one branch) each holds for; tokens: of a call."""
    found: Counter[Deal] = Counter()
    for site in sites:
        for bucket in buckets:
            shares: dict[str, list[int]] = {}
            for head in range(site.heads):
                shares.setdefault(recipe.method_in(site, head, bucket, tokens), []).append(head)
            found[tuple((name, tuple(heads)) for name, heads in sorted(shares.items()))] += bucket.steps
    return found


def forecast_deal(deal: Deal, times: Times) -> float:
    """Seconds of one call by the times of its methods alone."""
    heads = sum(len(own) for _, own in deal)
    parts = sum(len(own) / heads * times.ratio(name) for name, own in deal) * times.dense.median
    return parts + times.split * (len(deal) - 1)


def confirm(
    model: Any,
    objective: Objective,
    sample: Sample,
    site: str,
    known: tuple[Recipe, Counter[Deal], Times],
    rounds: int,
) -> Confirmed:
    """Time the commonest ways to deal heads inside the first call of `site`, interleaved with dense.

    Methods that were not timed before (published settings) are forecast as dense ones.
    """
    recipe, every, times = known
    times = _with(times, recipe)
    sparse = [deal for deal, _ in every.most_common() if [name for name, _ in deal] != ["dense"]]
    chosen = sparse[:MOST]
    found: list[Confirmed] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> None:
        calls = {str(n): _call(recipe, deal, (q, k, v, call), inner) for n, deal in enumerate(chosen)}
        for run in calls.values():
            run()
        contenders = {"dense": lambda: inner(q, k, v, call), **calls}
        generator = torch.Generator().manual_seed(0)
        paired = compare_paired(contenders, max(rounds, 2), q.device, generator, warmup=0)
        scale = paired.times["dense"].median / times.dense.median
        timed = tuple(
            ConfirmedCall(
                _words(recipe, deal),
                every[deal],
                scale * forecast_deal(deal, times),
                paired.times[str(n)].median,
                len(deal),
            )
            for n, deal in enumerate(chosen)
        )
        rest = {deal: count for deal, count in every.items() if deal not in chosen}
        others = sum(rest.values())
        spent = sum(count * forecast_deal(deal, times) / times.dense.median for deal, count in rest.items())
        found.append(Confirmed(timed, paired.times["dense"].median, others, spent / others if others else 1.0))

    with torch.no_grad(), attach_method(model, Inside(site, look)):
        objective.brief(model, sample)
    if not found:
        raise AdviceError(f"Site {site!r} was never called; the host adapter reports sites that do not run.")
    return found[0]


def refined(times: Times, found: Confirmed) -> Times:
    """The times, with the cost of further methods in a call as these calls say it: the median over them."""
    scale = times.dense.median / found.dense
    mixed = [c for c in found.calls if c.ways > 1]
    if not mixed:
        return times
    costs = [scale * (c.measured - c.forecast) / (c.ways - 1) + times.split for c in mixed]
    return replace(times, split=max(0.0, median(costs)))


def _with(times: Times, recipe: Recipe) -> Times:
    missing: Mapping[str, Any] = {n: times.dense for n in recipe.methods if n not in times.methods}
    return replace(times, methods={**times.methods, **missing})


def _call(recipe: Recipe, deal: Deal, qkv: tuple[Tensor, Tensor, Tensor, SiteCall], inner: Core) -> Any:
    q, k, v, call = qkv
    shares = dict(deal)
    mixed = mixture({n: recipe.methods[n] for n in shares if n != "dense"}, shares, call.site)
    return lambda: mixed.core(q, k, v, call, inner)


def _words(recipe: Recipe, deal: Deal) -> str:
    named = [(len(own), "dense" if name == "dense" else recipe.methods[name].words()) for name, own in deal]
    return "; ".join(f"{count} head{'s' if count > 1 else ''} {words}" for count, words in named)
