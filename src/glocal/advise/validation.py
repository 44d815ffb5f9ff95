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
from glocal.advise.recipe import Recipe
from glocal.advise.workload import Sample
from glocal.measure.stats import Acceptance, accept, drift
from glocal.ops import Score, attend
from glocal.patterns import Dense
from glocal.plan.build import PlanSpec, plan


@dataclass(frozen=True)
class Pair:
    """One sample, dense and sparse: seconds, main error, the two anchors, drift, and the domain's own measures."""

    sample: str
    dense_time: float
    sparse_time: float
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
    """pairs: one for each sample. verdict: the acceptance rule over them. outputs: (dense, sparse, floor) by sample."""

    pairs: tuple[Pair, ...]
    verdict: Acceptance
    outputs: Mapping[str, tuple[Output, Output, Output]]


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

        def dense_run(sample: Sample = sample) -> Output:
            return objective.run(model, sample)

        def sparse_run(sample: Sample = sample) -> Output:
            with attach(model, recipe):
                return objective.run(model, sample)

        if number % 2 == 0:
            dense, dense_time = timed(dense_run)
            sparse, sparse_time = timed(sparse_run)
        else:
            sparse, sparse_time = timed(sparse_run)
            dense, dense_time = timed(dense_run)
        with attach_method(model, OtherKernel()):
            other = objective.run(model, sample)
        measures = objective.distance(dense, sparse)
        pairs.append(
            Pair(
                sample.id,
                dense_time,
                sparse_time,
                main_error(objective.distance(dense, sparse)),
                main_error(objective.distance(dense, other)),
                main_error(objective.distance(dense, objective.ceiling(model, sample))),
                measures,
            )
        )
        outputs[sample.id] = (dense, sparse, other)
        if advance is not None:
            advance()
    verdict = accept(
        [p.drift for p in pairs],
        [p.dense_time for p in pairs],
        [p.sparse_time for p in pairs],
        limit=limit,
        target=target,
    )
    return Validation(tuple(pairs), verdict, outputs)
