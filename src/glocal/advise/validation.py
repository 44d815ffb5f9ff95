"""Validation on samples never seen before: dense and sparse from the same noise, between a floor and a ceiling.

floor: dense against dense through another exact kernel; ceiling: dense with another seed.
drift = (error - floor) / (ceiling - floor).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.attach import attach as attach_method
from glocal.adapt.records import Core, SiteCall
from glocal.advise.apply import attach
from glocal.advise.effort import Target
from glocal.advise.objective import Objective, Output, main_error, on_cpu
from glocal.advise.preflight import Place, Stopwatch
from glocal.advise.probe import MediaMethod
from glocal.advise.recipe import Recipe, Status
from glocal.advise.workload import Sample
from glocal.measure.stats import Acceptance, Interval, accept, drift, log_ratio, paired
from glocal.ops import Score, attend
from glocal.patterns import Causal, Dense
from glocal.plan.build import PlanSpec, plan


@dataclass(frozen=True)
class Spent:
    """Seconds of one run: whole, in its steps (forwards of the model), and in their attention."""

    whole: float
    steps: float
    attention: float


@dataclass(frozen=True)
class Pair:
    """One sample, dense and sparse: seconds, main error, the two anchors, drift, and the domain's own measures."""

    sample: str
    dense: Spent
    sparse: Spent
    error: float
    floor: float
    ceiling: float
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def drift(self) -> float:
        """0: no more than a change of kernel; 1: another sample."""
        return drift(self.error, self.floor, self.ceiling)


@dataclass(frozen=True, eq=False)
class Validation:
    """pairs: one for each sample. verdict: the acceptance rule over them. outputs: (dense, sparse, floor) by sample.
    operator, step: speed-ups of the attention and of the forwards, over the same pairs; verdict.speedup is end to end.
    places: the canvases these samples were on.
    """

    pairs: tuple[Pair, ...]
    verdict: Acceptance
    operator: Interval
    step: Interval
    outputs: Mapping[str, tuple[Output, Output, Output]]
    places: tuple[Place, ...] = ()


def judged(found: Validation) -> tuple[Status, str]:
    """Status (`validated` needs 8 accepted pairs) and the sentence that says why."""
    verdict, n = found.verdict, len(found.pairs)
    if not verdict.accepted:
        return "dense", "Validation failed: " + "; ".join(verdict.failures) + "."
    reason = f"{verdict.speedup.mean:.2f}x end to end at drift {verdict.drift.mean:.3f} over {n} unseen pairs."
    return "validated" if n >= 8 else "candidate", reason


class OtherKernel(MediaMethod):
    """Exact attention through another kernel than the host's: what changing a kernel does anyway."""

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """Dense attention as a plan of full blocks, by the first kernel of `OTHERS` that runs the call."""
        score = Score(scale=call.site.scale, softcap=call.site.softcap)
        refusal = ValueError(f"no kernel is known for {q.device.type}")
        for backend, size in OTHERS.get(q.device.type, ()):
            whole = plan(Causal() if call.site.causal else Dense(), call.layout, PlanSpec(size, size), device=q.device)
            try:
                return attend(q, k, v, whole, canvas=call.layout, score=score, backend=backend).out
            except ValueError as error:  # this kernel does not run such calls
                refusal = error
        raise refusal


# Block-list kernels and their block sizes: none of them is what hosts run by themselves.
OTHERS = {
    "cpu": (("cpu", 64), ("reference", 64)),
    "cuda": (("triton", 64), ("flex", 128), ("reference", 64)),
}


def timed(run: Callable[[], Output]) -> tuple[Output, float]:
    """Result and seconds of ``run()``."""
    began = time.perf_counter()
    out = run()
    if out.tensor.is_cuda:
        torch.cuda.synchronize()
    return out, time.perf_counter() - began


@dataclass(frozen=True, eq=False)
class PairRun:
    """One sample's runs. outputs: dense, sparse, dense through another kernel, on the CPU. places: where the tokens of
    its attention calls lay.
    """

    pair: Pair
    outputs: tuple[Output, Output, Output]
    place: Place | None


def run_pair(model: Any, objective: Objective, number: int, sample: Sample, recipe: Recipe) -> PairRun:
    """Dense and sparse (sparse first where `number` is odd), and the two anchors."""
    runs: dict[str, tuple[Output, Spent]] = {}
    place = None
    for name in ("dense", "sparse") if number % 2 == 0 else ("sparse", "dense"):
        out, spent, place = spent_on(model, recipe if name == "sparse" else None, sample, objective)
        runs[name] = out, spent
    (dense, dense_spent), (sparse, sparse_spent) = runs["dense"], runs["sparse"]
    with attach_method(model, OtherKernel()):
        other = objective.run(model, sample)
    measures = dict(objective.distance(dense, sparse))
    floor = main_error(objective.distance(dense, other))
    ceiling = main_error(objective.distance(dense, objective.ceiling(model, sample)))
    pair = Pair(sample.id, dense_spent, sparse_spent, main_error(measures), floor, ceiling, measures)
    return PairRun(pair, (on_cpu(dense), on_cpu(sparse), on_cpu(other)), place)


def verdict_over(runs: Sequence[PairRun], target: Target) -> Validation:
    """The acceptance rule over at least two pairs."""
    pairs = [run.pair for run in runs]
    limits = dict(target.limits)
    drift_limit = limits.pop("drift", 0.10)
    scope = {"operator": "attention", "step": "steps"}.get(target.of, "whole")
    needed = 1.0 if target.speedup is None else target.speedup
    found = accept(
        [p.drift for p in pairs],
        [getattr(p.dense, scope) for p in pairs],
        [getattr(p.sparse, scope) for p in pairs],
        limit=drift_limit,
        target=needed,
    )
    failures = list(found.failures)
    whole = log_ratio([p.dense.whole for p in pairs], [p.sparse.whole for p in pairs])
    if scope != "whole" and whole.low < 1:
        failures.append(f"lower 90% bound of the end-to-end speed-up {whole.low:.2f}x is below 1.00x")
    for name, limit in sorted(limits.items()):
        values = [p.measures[name] for p in pairs]
        mean = paired(values)
        if mean.high > limit:
            failures.append(f"upper 90% bound of mean {name} {mean.high:.3g} exceeds the limit {limit:.3g}")
        if max(values) > 2 * limit:
            failures.append(f"worst {name} {max(values):.3g} exceeds twice the limit {2 * limit:.3g}")
    verdict = replace(found, accepted=not failures, failures=tuple(failures), speedup=whole)
    operator = log_ratio([p.dense.attention for p in pairs], [p.sparse.attention for p in pairs])
    step = log_ratio([p.dense.steps for p in pairs], [p.sparse.steps for p in pairs])
    outputs = {run.pair.sample: run.outputs for run in runs}
    places = tuple(dict.fromkeys(run.place for run in runs if run.place is not None))
    return Validation(tuple(pairs), verdict, operator, step, outputs, places)


def validate_pairs(
    model: Any,
    recipe: Recipe,
    samples: Sequence[Sample],
    objective: Objective,
    *,
    target: Target | None = None,
    advance: Any = None,
) -> Validation:
    """Pairs over `samples` (at least two), order of dense and sparse alternated, and the verdict over them."""
    runs = []
    for number, sample in enumerate(samples):
        runs.append(run_pair(model, objective, number, sample, recipe))
        if advance is not None:
            advance()
    return verdict_over(runs, Target() if target is None else target)


def spent_on(
    model: Any, recipe: Recipe | None, sample: Sample, objective: Objective
) -> tuple[Output, Spent, Place | None]:
    """Run a sample, dense or with a recipe, with a watch on its steps and its attention."""
    watch, marks = Stopwatch(), [0.0]
    handles = [] if recipe is None else [attach(model, recipe, on_unseen="run")]
    handles.append(attach_method(model, watch))
    try:
        marks[0] = time.perf_counter()
        out, whole = timed(lambda: objective.run(model, sample, on_step=lambda _: marks.append(time.perf_counter())))
    finally:
        for handle in reversed(handles):
            handle.undo()
    return out, Spent(whole, marks[-1] - marks[0], watch.seconds), watch.place
