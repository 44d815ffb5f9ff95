"""Paired statistics: t intervals over pairs, log-ratio intervals, drift, and the acceptance rule for a sparse recipe.

A comparison is always made on the same samples; what is averaged is the difference (or the log of the ratio) of a pair,
because the spread between samples is far larger than the gap between methods. All functions are pure and take floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glocal.measure.student import t_cdf, t_quantile

__all__ = [
    "Acceptance",
    "Interval",
    "accept",
    "drift",
    "exceedance",
    "exceedance_statement",
    "log_ratio",
    "paired",
    "t_cdf",
    "t_quantile",
]


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided confidence interval; each end alone is a one-sided bound of level (1 + level) / 2."""

    mean: float
    low: float
    high: float
    level: float
    n: int


@dataclass(frozen=True)
class Acceptance:
    """Verdict of `accept`: the numbers it judged, and one sentence per broken condition."""

    accepted: bool
    drift: Interval
    worst: float
    worst_index: int
    speedup: Interval
    limit: float
    target: float
    failures: tuple[str, ...]


def _checked(values: Sequence[float], name: str) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) < 2:
        raise ValueError(f"{name} holds {len(numbers)} value(s); an interval needs at least 2 pairs")
    for index, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"{name}[{index}] is {number!r}; every value must be finite")
    return numbers


def paired(differences: Sequence[float], level: float = 0.90) -> Interval:
    """Student t interval of the mean of paired differences. differences: at least 2 finite numbers; level in (0, 1)."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}")
    numbers = _checked(differences, "differences")
    n = len(numbers)
    mean = math.fsum(numbers) / n
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (n - 1)
    half = t_quantile(0.5 + 0.5 * level, n - 1) * math.sqrt(variance / n)
    return Interval(mean=mean, low=mean - half, high=mean + half, level=level, n=n)


def log_ratio(numerators: Sequence[float], denominators: Sequence[float], level: float = 0.90) -> Interval:
    """Geometric mean of paired ratios with its t interval taken on logarithms (speed-up: dense times, sparse times).

    Both sequences: the same number (>= 2) of positive finite numbers in one unit. The result has no unit.
    """
    above, below = _checked(numerators, "numerators"), _checked(denominators, "denominators")
    if len(above) != len(below):
        raise ValueError(f"numerators has {len(above)} values and denominators {len(below)}; they must be pairs")
    for name, numbers in (("numerators", above), ("denominators", below)):
        for index, number in enumerate(numbers):
            if number <= 0:
                raise ValueError(f"{name}[{index}] is {number!r}; a ratio needs positive values")
    logs = paired([math.log(a / b) for a, b in zip(above, below, strict=True)], level)
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), level, logs.n)


def drift(error: float, floor: float, ceiling: float) -> float:
    """(error - floor) / (ceiling - floor): 0 = no more than changing a kernel does, 1 = another sample altogether.

    All three are distances to the dense result in one metric. Negative where the error lies below the floor.
    """
    if not all(math.isfinite(value) for value in (error, floor, ceiling)):
        raise ValueError(f"error, floor and ceiling must be finite, got {error!r}, {floor!r}, {ceiling!r}")
    if ceiling <= floor:
        raise ValueError(f"ceiling ({ceiling!r}) must exceed floor ({floor!r}); drift has no scale otherwise")
    return (error - floor) / (ceiling - floor)


def exceedance(n: int) -> float:
    """Chance that a new sample exceeds the worst of `n` exchangeable ones: at most 1 / (n + 1)."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n!r}")
    return 1.0 / (n + 1)


def exceedance_statement(n: int) -> str:
    """The sentence printed beside a worst sample of `n`."""
    bound = exceedance(n)
    return f"A new sample from this workload exceeds the worst of {n} with probability at most 1/{n + 1} ({bound:.0%})."


def accept(
    drifts: Sequence[float],
    dense_times: Sequence[float],
    sparse_times: Sequence[float],
    *,
    limit: float = 0.10,
    target: float = 1.0,
    level: float = 0.90,
) -> Acceptance:
    """Accept a recipe when all three hold over the same pairs:

    upper bound of mean drift <= limit, worst drift <= 2 x limit, lower bound of the speed-up >= target. The bounds are
    the ends of two-sided intervals of `level` (drift: t over pairs; speed-up: t on logs of dense time / sparse time).
    """
    if not (len(drifts) == len(dense_times) == len(sparse_times)):
        raise ValueError(
            f"drifts, dense_times and sparse_times must be of one length, got {len(drifts)}, {len(dense_times)}, "
            f"{len(sparse_times)}"
        )
    if limit <= 0 or target <= 0:
        raise ValueError(f"limit and target must be positive, got limit={limit!r}, target={target!r}")
    mean_drift = paired(drifts, level)
    speedup = log_ratio(dense_times, sparse_times, level)
    worst_index = max(range(len(drifts)), key=lambda index: drifts[index])
    worst = float(drifts[worst_index])
    failures: list[str] = []
    if mean_drift.high > limit:
        failures.append(f"upper {level:.0%} bound of mean drift {mean_drift.high:.3f} exceeds the limit {limit:.3f}")
    if worst > 2 * limit:
        failures.append(f"worst drift {worst:.3f} exceeds twice the limit {2 * limit:.3f}")
    if speedup.low < target:
        failures.append(f"lower {level:.0%} bound of the speed-up {speedup.low:.2f}x is below the target {target:.2f}x")
    return Acceptance(not failures, mean_drift, worst, worst_index, speedup, limit, target, tuple(failures))
