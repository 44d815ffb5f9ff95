"""A time model fitted to a few timed calls: `t0 + full_blocks * a + partial_blocks * b + imbalance`.

For one backend, shape and dtype; block counts come from the planner, so that every other plan's time is arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_TRUST = 0.10


@dataclass(frozen=True)
class TimeSample:
    """One timed call: its block counts, its imbalance (any fixed unit) and its seconds."""

    full_blocks: float
    partial_blocks: float
    imbalance: float
    seconds: float

    @property
    def features(self) -> tuple[float, float, float, float]:
        return (1.0, self.full_blocks, self.partial_blocks, self.imbalance)


@dataclass(frozen=True)
class TimeModel:
    """Seconds = t0 + full_blocks * full + partial_blocks * partial + imbalance * uneven; no coefficient is negative.

    fit_error, check_error: worst relative error on the fitted and on the held-out samples (None: none were given).
    """

    t0: float
    full: float
    partial: float
    uneven: float
    fit_error: float
    check_error: float | None

    @property
    def trusted(self) -> bool:
        """Whether held-out samples were met within 10 %."""
        return self.check_error is not None and self.check_error <= _TRUST

    def seconds(self, full_blocks: float, partial_blocks: float, imbalance: float = 0.0) -> float:
        """Forecast one call of the fitted backend, shape and dtype."""
        return self.t0 + self.full * full_blocks + self.partial * partial_blocks + self.uneven * imbalance


def fit_time_model(samples: Sequence[TimeSample], held_out: Sequence[TimeSample] = ()) -> TimeModel:
    """Least squares on relative errors with non-negative coefficients, checked on samples outside the fit.

    Needs at least 4 samples. With only four coefficients the exact optimum is found by trying every set of
    coefficients held at zero. Raises ValueError for too few samples or times that are not positive.
    """
    if len(samples) < 4:
        raise ValueError(f"{len(samples)} samples for 4 coefficients; legal: at least 4; nearest: 4")
    for sample in (*samples, *held_out):
        if not sample.seconds > 0:
            raise ValueError(f"seconds={sample.seconds} in a timed sample; legal: above 0; measure it again")
    rows = torch.tensor([s.features for s in samples], dtype=torch.float64)  # [samples, 4]
    rows = rows / torch.tensor([[s.seconds] for s in samples], dtype=torch.float64)
    scale = rows.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)  # [4]
    rows = rows / scale
    target = torch.ones(len(samples), 1, dtype=torch.float64)
    best, best_loss = torch.zeros(4, dtype=torch.float64), math.inf
    for count in range(1, 5):
        for free in itertools.combinations(range(4), count):
            part = rows[:, free]
            solution = torch.linalg.lstsq(part, target, driver="gelsd").solution  # [count, 1]
            loss = float((part @ solution - target).square().sum())
            if bool((solution >= 0).all()) and loss < best_loss - 1e-15:
                best = torch.zeros(4, dtype=torch.float64).index_put_((torch.tensor(free),), solution.flatten())
                best_loss = loss
    t0, full, partial, uneven = (best / scale).tolist()

    def worst(checked: Sequence[TimeSample]) -> float:
        return max(
            abs(t0 + full * s.full_blocks + partial * s.partial_blocks + uneven * s.imbalance - s.seconds) / s.seconds
            for s in checked
        )

    return TimeModel(t0, full, partial, uneven, worst(samples), worst(held_out) if held_out else None)
