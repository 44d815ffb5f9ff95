"""The time model: a few calls timed inside a real one, interleaved with dense; other plans are arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.adapt.records import SiteCall
from glocal.advise.methods import MethodSpec
from glocal.measure.timers import compare_paired
from glocal.ops import Score, attend
from glocal.plan.blockplan import BlockPlan
from glocal.plan.time_model import TimeModel, TimeSample, fit_time_model


@dataclass(frozen=True)
class MethodTime:
    """One method at one call of all heads, in seconds: median and spread, and the blocks it visits (a head's mean)."""

    method: str
    median: float
    low: float
    high: float
    rounds: int
    full: float
    partial: float
    kept: float
    visited: float
    kernel: str


@dataclass(frozen=True)
class Times:
    """dense: the best dense kernel present. methods: timed ones. model: fit over them, None with too few.
    trusted: whether the fit met plans outside it within 10 %; if not, only measured times are used.
    """

    dense: MethodTime
    methods: Mapping[str, MethodTime]
    model: TimeModel | None

    @property
    def trusted(self) -> bool:
        """Whether forecasts may stand in for measurements."""
        return self.model is not None and self.model.trusted

    def ratio(self, method: str) -> float:
        """Time of a method over dense; "dense" is 1."""
        return 1.0 if method == "dense" else self.methods[method].median / self.dense.median


def blocks_of(plan: BlockPlan, heads: int) -> tuple[float, float]:
    """Full and partial blocks of one call of `heads` heads."""
    owner = plan.owner.long()
    full, partial = (float(lists.count.sum(-1).double()[owner].mean()) * heads for lists in (plan.full, plan.partial))
    return full, partial


@torch.no_grad()
def time_methods(
    q: Tensor, k: Tensor, v: Tensor, call: SiteCall, methods: Mapping[str, MethodSpec], *, rounds: int = 5
) -> Times:
    """Time dense and every method on the real q, k, v [B, H, N, D] of a call, in one interleaved comparison.

    Planning of patterns is outside (plans are cached); routing of routers is inside, as it will be.
    """
    scale = Score(scale=call.site.scale)
    plans = {name: m.plan(call.layout, q, k) for name, m in methods.items()}
    kernels = {}
    contenders: dict[str, Callable[[], object]] = {"dense": lambda: attend(q, k, v, canvas=call.layout, score=scale)}
    kernels["dense"] = attend(q, k, v, canvas=call.layout, score=scale).picked.name
    for name, method in methods.items():
        kernels[name] = method.run(q, k, v, call.layout, call.site.scale)[2]
        contenders[name] = lambda method=method: method.run(q, k, v, call.layout, call.site.scale)
    found = compare_paired(contenders, rounds=rounds, device=q.device, generator=torch.Generator().manual_seed(0))
    times = {}
    for name, timing in found.times.items():
        plan = plans.get(name)
        full, partial = (0.0, 0.0) if plan is None else blocks_of(plan, q.shape[1])
        times[name] = MethodTime(
            name,
            timing.median,
            timing.low,
            timing.high,
            len(timing.samples),
            full,
            partial,
            1.0 if plan is None else plan.kept,
            1.0 if plan is None else plan.visited,
            kernels[name],
        )
    dense = times.pop("dense")
    samples = [TimeSample(t.full, t.partial, 0.0, t.median) for n, t in times.items() if methods[n].kind == "pattern"]
    fitted, held = samples[::2], samples[1::2]
    model = fit_time_model(fitted, held) if len(fitted) >= 4 else None
    return Times(dense, times, model)
