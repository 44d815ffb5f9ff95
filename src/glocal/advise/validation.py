"""Validation on samples never seen before: dense and sparse from the same noise, between a floor and a ceiling.

floor: dense against dense through another exact kernel; ceiling: dense with another seed.
drift = (error - floor) / (ceiling - floor).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.attach import Method
from glocal.adapt.attach import attach as attach_method
from glocal.adapt.records import Core, SiteCall
from glocal.advise.apply import attach
from glocal.advise.objective import Latents, Output, main_error
from glocal.advise.preflight import Stopwatch
from glocal.advise.recipe import Recipe, Status
from glocal.advise.workload import Sample
from glocal.measure.stats import Acceptance, Interval, accept, drift, log_ratio
from glocal.ops import Score, attend
from glocal.patterns import Dense
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
    """

    pairs: tuple[Pair, ...]
    verdict: Acceptance
    operator: Interval
    step: Interval
    outputs: Mapping[str, tuple[Output, Output, Output]]


def judged(found: Validation) -> tuple[Status, str]:
    """Status (`validated` needs 8 accepted pairs) and the sentence that says why."""
    verdict, n = found.verdict, len(found.pairs)
    if not verdict.accepted:
        return "dense", "Validation failed: " + "; ".join(verdict.failures) + "."
    reason = f"{verdict.speedup.mean:.2f}x end to end at drift {verdict.drift.mean:.3f} over {n} unseen pairs."
    return "validated" if n >= 8 else "candidate", reason


class OtherKernel(Method):
    """Exact attention through the block-list kernel instead of the dense one: what changing a kernel does anyway."""

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """Dense attention as a plan of full blocks."""
        whole = plan(Dense(), call.layout, PlanSpec(64, 64), device=q.device)
        backend = "cpu" if q.device.type == "cpu" else "flex"
        return attend(q, k, v, whole, score=Score(scale=call.site.scale), backend=backend).out


def timed(run: Any) -> tuple[Output, float]:
    """Result and seconds of ``run()``."""
    began = time.perf_counter()
    out = run()
    if out.tensor.is_cuda:
        torch.cuda.synchronize()
    return out, time.perf_counter() - began


def validate_pairs(
    model: Any,
    recipe: Recipe,
    samples: Sequence[Sample],
    objective: Latents,
    *,
    limit: float = 0.10,
    target: float = 1.0,
    advance: Any = None,
) -> Validation:
    """Pairs over `samples` (at least two), order of dense and sparse alternated, and the verdict over them."""
    pairs, outputs = [], {}
    for number, sample in enumerate(samples):
        runs: dict[str, tuple[Output, Spent]] = {}
        for name in ("dense", "sparse") if number % 2 == 0 else ("sparse", "dense"):
            runs[name] = spent_on(model, recipe if name == "sparse" else None, sample, objective)
        (dense, dense_spent), (sparse, sparse_spent) = runs["dense"], runs["sparse"]
        with attach_method(model, OtherKernel()):
            other = objective.run(model, sample)
        measures = dict(objective.distance(dense, sparse))
        floor = main_error(objective.distance(dense, other))
        ceiling = main_error(objective.distance(dense, objective.ceiling(model, sample)))
        pairs.append(Pair(sample.id, dense_spent, sparse_spent, main_error(measures), floor, ceiling, measures))
        outputs[sample.id] = (dense, sparse, other)
        if advance is not None:
            advance()
    verdict = accept(
        [p.drift for p in pairs],
        [p.dense.whole for p in pairs],
        [p.sparse.whole for p in pairs],
        limit=limit,
        target=target,
    )
    operator = log_ratio([p.dense.attention for p in pairs], [p.sparse.attention for p in pairs])
    step = log_ratio([p.dense.steps for p in pairs], [p.sparse.steps for p in pairs])
    return Validation(tuple(pairs), verdict, operator, step, outputs)


def spent_on(model: Any, recipe: Recipe | None, sample: Sample, objective: Latents) -> tuple[Output, Spent]:
    """Run a sample, dense or with a recipe, with a watch on its steps and its attention."""
    watch, marks = Stopwatch(), [0.0]
    handles = [] if recipe is None else [attach(model, recipe)]
    handles.append(attach_method(model, watch))
    try:
        marks[0] = time.perf_counter()
        out, whole = timed(lambda: objective.run(model, sample, on_step=lambda _: marks.append(time.perf_counter())))
    finally:
        for handle in reversed(handles):
            handle.undo()
    return out, Spent(whole, marks[-1] - marks[0], watch.seconds)
