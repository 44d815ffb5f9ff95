"""How far a method's errors in the residual stream add up to a change of the model's output: its gain.

Errors of one method may pull the same way in many heads and layers (a window that never sees other frames), or cancel
(the weakest keys left out). Their root of summed squares does not say which. So each method runs everywhere in one step
of the whole model, from a latent of the dense run; the change behind that step over the summed error there is its gain,
and probe records count by it. One step for each method; all gains together are scaled to a geometric mean of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glocal.advise.allocate import allocate
from glocal.advise.apply import attach
from glocal.advise.objective import Objective
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Recipe
from glocal.advise.search import Found
from glocal.advise.weights import fit_weights
from glocal.advise.workload import Sample

_AROUND = (0.3, 0.45, 0.6, 0.75, 0.9)  # budgets of attention time that a search may move between
MOST = 8.0  # a gain further from the mean than this is a fluke of a step where a method changed next to nothing


class _Enough(Exception):
    """Ends a run behind the step that is looked at."""


def step_error(
    model: Any, objective: Objective, sample: Sample, recipe: Recipe, at: tuple[int, Tensor | None, Tensor]
) -> float:
    """Relative change of the latent behind one step under `recipe`.

    at: the step, the latent before it (None: the run begins at its start) and the dense latent behind it.
    """
    step, before, dense = at
    start = 0 if before is None else step
    behind: list[Tensor] = []

    def look(state: Any) -> None:
        behind.append(state.latent)
        if len(behind) == step - start + 1:
            raise _Enough

    with attach(model, recipe, on_unseen="run"):
        with suppress(_Enough):
            objective.run(model, sample, start=start, latent=before, on_step=look)
    wanted = dense.float().cpu()
    return float((behind[-1].detach().float().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def summed(records: Sequence[ProbeRecord], method: str, step: int, sample: str) -> float:
    """Root of the summed squared residual errors of a method over all heads at one step of a sample."""
    mine = [r for r in records if (r.method, r.step, r.sample) == (method, step, sample) and r.head >= 0]
    branches = len({r.branch for r in mine})
    return math.sqrt(sum(r.residual**2 for r in mine) / max(branches, 1))


def gains(changed: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
    """changed: of the output by method; errors: summed in the residual stream. 1.0 where one of them is zero."""
    logs = {m: math.log(c / errors[m]) for m, c in changed.items() if c > 0 and errors.get(m, 0.0) > 0}
    mean = sum(logs.values()) / max(len(logs), 1)
    limit = math.log(MOST)
    return {m: math.exp(min(max(logs[m] - mean, -limit), limit)) if m in logs else 1.0 for m in changed}


def counted_by(found: Found, gain: Mapping[str, float]) -> Found:
    """The methods with a gain alone, their residual errors counted by it; step weights fitted anew."""
    runs = [replace(r, residual=r.residual * gain[r.method]) for r in found.weights.runs if r.method in gain]
    return replace(
        found,
        records=[replace(r, residual=r.residual * gain[r.method]) for r in found.records if r.method in gain],
        weights=fit_weights(found.buckets, runs),
        methods={n: m for n, m in found.methods.items() if n in gain},
    )


def finalists(found: Found, budgets: Sequence[float], count: int, always: Sequence[str]) -> list[str]:
    """At most `count` methods worth calibrating: `always`, those that allocations at several budgets use most, then
    those that would err least everywhere for their time.
    """
    if len(found.methods) <= count:
        return list(found.methods)
    items = found.items()
    weights = torch.tensor(found.weights.weight, dtype=torch.float64)
    used: Counter[str] = Counter()
    for budget in sorted({*budgets, *_AROUND}):
        if float(items.time.amin(1).sum()) <= budget * items.dense_time:
            choice = allocate(items, weights, time_budget=budget * items.dense_time).choice
            used.update(items.methods[i] for i in choice.tolist() if i)
    price = {n: found.uniform_error(n, found.buckets) * found.times.ratio(n) for n in found.methods}
    ranked = sorted(found.methods, key=lambda n: (n not in always, -used[n], price[n]))
    return ranked[:count]
