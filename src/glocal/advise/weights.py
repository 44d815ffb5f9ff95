"""Step weights: how much an error made at a noise level is worth at the end of the run.

One bucket of steps is made sparse with a plain method, everything else stays dense, and the run goes on from the latent
that the dense run had there. The end-to-end error over the one-step error is the bucket's weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from glocal.advise.apply import attach
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Latents, Output, main_error
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Fallback, Phase, Recipe, Rule
from glocal.advise.workload import Sample
from glocal.models.generation import SampleStep


@dataclass(frozen=True)
class Bucket:
    """Consecutive steps `first`..`last` with noise levels low < sigma <= high; travel: the noise level they cover."""

    number: int
    first: int
    last: int
    low: float
    high: float

    @property
    def steps(self) -> int:
        """How many steps it holds."""
        return self.last - self.first + 1

    @property
    def phase(self) -> Phase:
        """The bucket as a phase of a rule."""
        return Phase("sigma", self.low, self.high)


@dataclass(frozen=True)
class StepWeight:
    """One one-bucket run: the error at the end, the error after its first step (both relative to the clean result), and
    the residual error (root of summed squares over sites and heads) that the probe found for the method there.
    """

    bucket: int
    method: str
    end_to_end: float
    one_step: float
    residual: float


@dataclass(frozen=True)
class Weights:
    """weight: end-to-end error for one unit of residual error, by bucket. step: the same for one unit of summed
    one-step error (u_b). gain: one-step error for one unit of residual error (head coherence and the model's own gain).
    """

    buckets: tuple[Bucket, ...]
    weight: tuple[float, ...]
    step: tuple[float, ...]
    gain: tuple[float, ...]
    runs: tuple[StepWeight, ...]
    leave_one_out: tuple[float, ...]

    @property
    def band(self) -> float:
        """90 % of left-out predictions lie within this factor of the measurement (the worst of fewer than ten)."""
        if not self.leave_one_out:
            return math.inf
        factors = sorted(max(r, 1 / r) for r in self.leave_one_out)
        return factors[min(len(factors) - 1, math.ceil(0.9 * len(factors)) - 1)]


def make_buckets(levels: Sequence[float], count: int) -> tuple[Bucket, ...]:
    """Cut the steps of a run (noise levels, one more than steps) into `count` buckets of nearly equal step numbers."""
    steps = len(levels) - 1
    count = min(count, steps)
    edges = [round(i * steps / count) for i in range(count + 1)]
    return tuple(Bucket(i, a, b - 1, levels[b], levels[a]) for i, (a, b) in enumerate(pairwise(edges)))


def residual_total(records: Sequence[ProbeRecord], method: str, bucket: int) -> float:
    """Root of the summed squares over sites and heads, the mean over the probed steps of a bucket."""
    by_step: dict[tuple[int, str, str], float] = {}
    for r in records:
        if r.method == method and r.bucket == bucket and r.head >= 0:
            key = (r.step, r.branch, r.sample)
            by_step[key] = by_step.get(key, 0.0) + r.residual**2
    return math.sqrt(sum(by_step.values()) / len(by_step)) if by_step else 0.0


def step_weights(
    model: Any,
    sample: Sample,
    objective: Latents,
    buckets: Sequence[Bucket],
    methods: Mapping[str, MethodSpec],
    records: Sequence[ProbeRecord],
    dense: tuple[Output, Sequence[Tensor]],
    *,
    layers: tuple[tuple[int, int], ...],
    fallback: Fallback,
    advance: Any = None,
) -> Weights:
    """Measure the weights. dense: the dense output and the latents before every step of the same sample; layers: which
    ones are made sparse, as inclusive ranges.
    """
    output, latents = dense
    scale = float(output.tensor.float().norm())
    runs = []
    for bucket in buckets:
        for name, method in methods.items():
            rule = Rule(name, layers, "all", bucket.phase)
            recipe = Recipe("candidate", {name: method}, (rule,), fallback=fallback)
            after: list[SampleStep] = []
            with attach(model, recipe):
                sparse = objective.run(
                    model,
                    sample,
                    start=bucket.first,
                    latent=latents[bucket.first] if bucket.first else None,
                    on_step=after.append,
                )
            end = main_error(objective.distance(output, sparse))
            reference = latents[bucket.first + 1]
            one = float((after[0].latent.float() - reference.float()).norm()) / scale
            runs.append(StepWeight(bucket.number, name, end, one, residual_total(records, name, bucket.number)))
            if advance is not None:
                advance()
    return _fit(tuple(buckets), runs)


def _fit(buckets: tuple[Bucket, ...], runs: Sequence[StepWeight]) -> Weights:
    weight, step, gain, left_out = [], [], [], []
    for bucket in buckets:
        mine = [r for r in runs if r.bucket == bucket.number and r.residual > 0 and r.one_step > 0]
        ratios = [math.log(r.end_to_end / r.residual) for r in mine if r.end_to_end > 0]
        if not ratios:
            raise ValueError(f"No one-bucket run of bucket {bucket.number} changed the output; its weight is unknown.")
        weight.append(math.exp(sum(ratios) / len(ratios)))
        gain.append(math.exp(sum(math.log(r.one_step / r.residual) for r in mine) / len(mine)))
        step.append(weight[-1] / (gain[-1] * bucket.steps))
        for i, own in enumerate(ratios):
            rest = ratios[:i] + ratios[i + 1 :]
            if rest:
                left_out.append(math.exp(sum(rest) / len(rest) - own))
    return Weights(buckets, tuple(weight), tuple(step), tuple(gain), tuple(runs), tuple(left_out))
