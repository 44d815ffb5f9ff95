"""The time model: some 40 timed calls, and the times of any number of candidates by arithmetic.

For every order, block size and kernel among the candidates, plans of known block counts (`plan.known_counts`) are
timed on the real q, k, v: six densities, full blocks alone and partial ones among them, even and uneven rows. Their fit
is held against six more. Routing and correction are timed apart. Few candidates are timed one by one, as that costs no
more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from glocal.adapt.records import Core, SiteCall
from glocal.advise.methods import MethodSpec
from glocal.advise.probe import by_order
from glocal.advise.timing import (
    Checked,
    MethodTime,
    Ready,
    Times,
    blocks_of,
    dealt,
    sample_of,
    time_methods,
    timed_together,
    uneven_blocks,
)
from glocal.measure.timers import Timing
from glocal.ops import Score, attend
from glocal.plan.blockplan import BlockPlan
from glocal.plan.known_counts import CHECKED, FITTED, Counts, counted
from glocal.plan.time_model import TimeModel, fit_time_model

CALLS = len(FITTED) + len(CHECKED)  # timed for each group of candidates
MOST = 64  # candidates that are timed one by one where the model cannot be trusted


@dataclass(frozen=True, eq=False)
class Group:
    """Candidates with one order, block size and kernel, and the plans that are timed for them."""

    names: tuple[str, ...]
    plans: Mapping[str, tuple[Counts, BlockPlan]]

    def model(self, found: Mapping[str, Timing], heads: int) -> TimeModel:
        """The fit over its plans, held against those that are not in it."""
        samples = {n: sample_of(plan, heads, found[n].median) for n, (_, plan) in self.plans.items()}
        fitted = [samples[n] for n, (counts, _) in self.plans.items() if counts in FITTED]
        return fit_time_model(fitted, [samples[n] for n, (counts, _) in self.plans.items() if counts in CHECKED])

    def checks(self, model: TimeModel, found: Mapping[str, Timing], heads: int) -> list[Checked]:
        """The plans outside the fit, forecast and measured."""
        return [
            Checked(plan.name, forecast_of(model, plan, heads), found[n].median)
            for n, (counts, plan) in self.plans.items()
            if counts in CHECKED
        ]


def forecast_of(model: TimeModel, plan: BlockPlan, heads: int) -> float:
    """Seconds of one call of a plan."""
    return model.seconds(*blocks_of(plan, heads), uneven_blocks(plan, heads))


def grouped(methods: Mapping[str, Ready]) -> list[tuple[str, ...]]:
    """Candidates that one model serves; those with orders of their own for heads are in none."""
    plans = {n: r.plan for n, r in methods.items() if r.plan.q_order.shape[:2] == r.plan.kv_order.shape[:2] == (1, 1)}
    found = []
    for group in by_order(plans):
        for kernel in dict.fromkeys(methods[n].kernel for n in group):
            found.append(tuple(n for n in group if methods[n].kernel == kernel))
    return found


def one_by_one(methods: Mapping[str, Ready]) -> bool:
    """Whether timing every candidate costs no more than the model."""
    return len(methods) <= CALLS * max(1, len(grouped(methods)))


@torch.no_grad()
def times_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: SiteCall,
    methods: Mapping[str, Ready],
    *,
    rounds: int = 5,
    inner: Core | None = None,
) -> Times:
    """Times of all candidates on the q, k, v [B, H, N, D] of a call: measured where they are few, else by the model;
    and where that misses a plan outside its fit by more than 10 %, of `MOST` candidates, measured.
    """
    if one_by_one(methods):
        return time_methods(q, k, v, call, methods, rounds=rounds, inner=inner)
    heads = q.shape[1]
    groups, beside = known_plans(q, k, v, call, methods)
    terms = _terms(q, k, v, call, methods)
    modelled = {n for g in groups for n in g.names}
    own = {n: r for n, r in methods.items() if n not in modelled or n in dealt(list(methods), heads)}
    times, found = timed_together(q, k, v, call, own, {**beside, **terms}, rounds=rounds, inner=inner)
    models = {g.names: g.model(found, heads) for g in groups}
    checks = tuple(c for g in groups for c in g.checks(models[g.names], found, heads))
    forecasts: dict[str, MethodTime] = {}
    for names, model in models.items():
        for name in names:
            forecasts[name] = _forecast(methods[name], name, model, found, heads)
    worst = max(models.values(), key=lambda m: m.check_error or 0.0, default=None)
    if worst is None or not worst.trusted:
        some = _some(methods, forecasts)
        return replace(time_methods(q, k, v, call, some, rounds=rounds, inner=inner), model=worst, checks=checks)
    every = {n: times.methods[n] if n in own else forecasts[n] for n in methods}
    return replace(times, methods=every, model=worst, checks=checks)


def known_plans(
    q: Tensor, k: Tensor, v: Tensor, call: SiteCall, methods: Mapping[str, Ready]
) -> tuple[list[Group], dict[str, Callable[[], object]]]:
    """The groups whose kernel takes plans of known counts too, and those plans as calls that ran once."""
    score = Score(scale=call.site.scale, softcap=call.site.softcap)
    groups: list[Group] = []
    calls: dict[str, Callable[[], object]] = {}
    for number, names in enumerate(grouped(methods)):
        first = methods[names[0]]
        plans, own = {}, {}
        for place, counts in enumerate((*FITTED, *CHECKED)):
            made = counted(first.plan, counts)
            run = partial(attend, q, k, v, made, canvas=call.layout, score=score, backend=first.method.backend[0])
            if run().picked.name != first.kernel:
                break
            plans[f"plan {number}.{place}"], own[f"plan {number}.{place}"] = (counts, made), run
        else:
            groups.append(Group(names, plans))
            calls.update(own)
    return groups, calls


def _terms(
    q: Tensor, k: Tensor, v: Tensor, call: SiteCall, methods: Mapping[str, Ready]
) -> dict[str, Callable[[], object]]:
    """Routing of one method of each system and order, and correction of one of each order, as calls that ran once."""
    out: dict[str, Callable[[], object]] = {}
    for ready in methods.values():
        method, plan = ready.method, ready.plan
        routing, correction = _routing(method), _correction(method)
        if routing is not None and routing not in out:
            out[routing] = partial(method.plan, call.layout, q, k, call.site.scale, call)
        if correction is not None and correction not in out:
            out[correction] = partial(_corrected, method, (q, k, v, call), plan)
            out[correction]()
    return out


def _corrected(method: MethodSpec, qkv: tuple[Tensor, Tensor, Tensor, SiteCall], plan: BlockPlan) -> Tensor:
    q, k, v, call = qkv
    again = q.clone()  # what was looked at last is not what a call meets
    after = method.rectified(again, k, v, plan, call)
    return again if after is None else after.apply(again)


def _routing(method: MethodSpec) -> str | None:
    return f"routing of {method.system}, {method.order}, {method.block}" if method.kind == "route" else None


def _correction(method: MethodSpec) -> str | None:
    return None if method.correction == "none" else f"{method.correction}, {method.order}, {method.block}"


def _forecast(ready: Ready, name: str, model: TimeModel, found: Mapping[str, Timing], heads: int) -> MethodTime:
    terms = [term for term in (_routing(ready.method), _correction(ready.method)) if term is not None]
    seconds = forecast_of(model, ready.plan, heads) + sum(found[term].median for term in terms)
    off = model.check_error or 0.0
    full, part = blocks_of(ready.plan, heads)
    ends = seconds * (1 - off), seconds * (1 + off), 0
    kept, visited = ready.plan.kept, ready.plan.visited
    return MethodTime(name, seconds, *ends, full, part, kept, visited, ready.kernel, uneven_blocks(ready.plan, heads))


def _some(methods: Mapping[str, Ready], forecasts: Mapping[str, MethodTime]) -> dict[str, Ready]:
    """At most `MOST` candidates, spread over what they are forecast to take; those without a forecast first."""
    ranked: Sequence[str] = sorted(methods, key=lambda n: forecasts[n].median if n in forecasts else 0.0)
    if len(ranked) > MOST:
        ranked = [ranked[round(i * (len(ranked) - 1) / (MOST - 1))] for i in range(MOST)]
    return {n: methods[n] for n in ranked}
