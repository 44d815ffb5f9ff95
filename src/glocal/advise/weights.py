"""Step weights: how much an error made at a noise level is worth at the end of the run.

One bucket of steps runs by an allocation of its own, everything else stays dense, and the run goes on from the latent
that the dense run had there. The end-to-end error over the one-step error is the bucket's weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from torch import Tensor

from glocal.advise.apply import attach
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Coordinate, Objective, Output, main_error, on_cpu
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Fallback, Phase, Recipe, Rule
from glocal.advise.workload import Sample


@dataclass(frozen=True)
class Bucket:
    """Consecutive steps `first`..`last` with noise levels low < sigma <= high; travel: the noise level they cover."""

    number: int
    first: int
    last: int
    low: float
    high: float
    coordinate: Coordinate = "sigma"

    @property
    def steps(self) -> int:
        """How many steps it holds."""
        return self.last - self.first + 1

    @property
    def phase(self) -> Phase:
        """The bucket as a phase of a rule."""
        return phase_of(self.coordinate, self.low, self.high)


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


LONGEST = float(1 << 40)  # tokens of a prefill; which lengths were proven is said by the canvases of a recipe


def phase_of(coordinate: Coordinate, low: float, high: float) -> Phase:
    """Noise levels low < sigma <= high; all prefills; or always."""
    if coordinate == "sigma":
        return Phase("sigma", low, high)
    return Phase("prefill", 0.0, LONGEST) if coordinate == "prefill" else Phase()


def make_buckets(levels: Sequence[float], count: int, coordinate: Coordinate = "sigma") -> tuple[Bucket, ...]:
    """Cut the steps of a run (noise levels, one more than steps) into `count` buckets of nearly equal step numbers."""
    steps = len(levels) - 1
    count = min(count, steps)
    edges = [round(i * steps / count) for i in range(count + 1)]
    return tuple(Bucket(i, a, b - 1, levels[b], levels[a], coordinate) for i, (a, b) in enumerate(pairwise(edges)))


def residual_total(records: Sequence[ProbeRecord], method: str, bucket: int) -> float:
    """Root of the summed squares over sites and heads, the mean over the probed steps of a bucket."""
    by_step: dict[tuple[int, str, str], float] = {}
    for r in records:
        if r.method == method and r.bucket == bucket and r.head >= 0:
            key = (r.step, r.branch, r.sample)
            by_step[key] = by_step.get(key, 0.0) + r.residual**2
    return math.sqrt(sum(by_step.values()) / len(by_step)) if by_step else 0.0


def residual_under(records: Sequence[ProbeRecord], recipe: Recipe, bucket: Bucket) -> float:
    """Root of the summed squares over sites and heads of what a recipe runs in a bucket; of each, the mean over all
    that was probed there.
    """
    squares: dict[tuple[str, str, int, int], dict[str, list[float]]] = {}
    for r in records:
        if r.bucket == bucket.number and r.head >= 0:
            own = squares.setdefault((r.component, r.kind, r.layer, r.head), {})
            own.setdefault(r.method, []).append(r.residual**2)
    total = 0.0
    for (component, kind, layer, head), own in squares.items():
        use = recipe.method_at(
            layer, head, component=component, kind=kind, branch="cond", sigma=bucket.high, progress=None, tokens=1
        )
        if use != "dense":
            total += fmean(own[use])
    return math.sqrt(total)


def weight_run(
    model: Any,
    objective: Objective,
    sample: Sample,
    bucket: Bucket,
    recipe: Recipe,
    dense: tuple[Output, Tensor | None, Tensor],
) -> tuple[float, float]:
    """End-to-end error and one-step error where `bucket` alone is sparse (`recipe`).

    dense: the dense output, the latent before the bucket (None: the run begins at its start) and the one behind the
    bucket's first step.
    """
    output, latent, reference = dense
    after: list[Tensor] = []
    start = bucket.first if latent is not None else 0
    with attach(model, recipe, on_unseen="run"):
        sparse = objective.run(
            model, sample, start=start, latent=latent, on_step=lambda step: after.append(step.latent.detach().clone())
        )
    one = after[bucket.first - start].float().cpu() - reference.float().cpu()
    end = main_error(objective.distance(output, on_cpu(sparse)))
    return end, float(one.norm()) / float(output.tensor.float().norm())


def end_error(
    model: Any,
    objective: Objective,
    sample: Sample,
    bucket: Bucket,
    recipe: Recipe,
    dense: tuple[Output, Tensor | None, Tensor],
) -> float:
    """The end-to-end error of a `weight_run`."""
    return weight_run(model, objective, sample, bucket, recipe, dense)[0]


def one_bucket(bucket: Bucket, name: str, method: MethodSpec, rules: Sequence[Rule], fallback: Fallback) -> Recipe:
    """One method at all sites (a rule for each kind of site, its phase is replaced) in one bucket."""
    mine = tuple(replace(rule, use=name, phase=bucket.phase) for rule in rules)
    return Recipe("candidate", {name: method}, mine, fallback=fallback)


def even_weights(buckets: Sequence[Bucket]) -> Weights:
    """All step ranges alike: where a search begins."""
    one = (1.0,) * len(buckets)
    return Weights(tuple(buckets), one, one, one, (), ())


def fit_weights(buckets: Sequence[Bucket], runs: Sequence[StepWeight]) -> Weights:
    """Weights from one-bucket runs; ValueError where those of a bucket changed nothing."""
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
    return Weights(tuple(buckets), tuple(weight), tuple(step), tuple(gain), tuple(runs), tuple(left_out))
