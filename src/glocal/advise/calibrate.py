"""How far errors in the residual stream add up to a change of the model's output: gains of layers and of methods.

A layer's error is measured relative to the stream in front of it, and the stream grows from layer to layer, in the
first ones by a factor of ten: the same relative error there is soon a small one. So one layer at a time runs sparse in
one step of the whole model; the change behind that step over the error in that layer is the layer's gain.

Errors of one method may pull the same way in many heads and layers (a window that never sees other frames), or cancel
(the weakest keys left out). Their root of summed squares does not say which. So each method runs everywhere in one step
of the whole model, from a latent of the dense run; the change behind that step over the summed error there is its gain,
and probe records count by it. One step for each layer and method; the gains of all layers of a step range, and those of
all methods, are scaled to a geometric mean of one: step weights say the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glocal.advise.allocate import allocate
from glocal.advise.apply import attach
from glocal.advise.objective import Objective
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Phase, Recipe, Rule
from glocal.advise.rules import layer_ranges
from glocal.advise.search import Found
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


@dataclass(frozen=True)
class Group:
    """Neighbouring layers that have a gain together: of one component and kind of site."""

    component: str
    kind: str
    layers: tuple[int, ...]

    def holds(self, record: ProbeRecord) -> bool:
        """Whether a record is of one of its layers."""
        return (record.component, record.kind) == (self.component, self.kind) and record.layer in self.layers

    def rules(self, base: Sequence[Rule], method: str, phase: Phase) -> list[Rule]:
        """Rules that make these layers sparse and nothing else."""
        site = "joint" if self.kind == "joint" else "self"
        mine = [r for r in base if (r.component, r.site) == (self.component, site)]
        return [replace(r, use=method, phase=phase, layers=layer_ranges(self.layers)) for r in mine]


LayerGains = Mapping[tuple[str, str, int, int], float]  # component, kind of site, layer, bucket


def layer_groups(records: Sequence[ProbeRecord], most: int) -> list[Group]:
    """The probed layers, each alone or, where there are more than `most`, in groups that grow from layer to layer."""
    layers: dict[tuple[str, str], set[int]] = {}
    for r in records:
        layers.setdefault((r.component, r.kind), set()).add(r.layer)
    found = []
    for (component, kind), own in sorted(layers.items()):
        numbers = sorted(own)
        ends = list(range(1, len(numbers) + 1))
        if len(numbers) > most:
            ends = [max(i + 1, round(len(numbers) ** (i / (most - 1)))) for i in range(most)]
        found += [Group(component, kind, tuple(numbers[a:b])) for a, b in pairwise([0, *ends])]
    return found


def layer_gains(
    changed: Mapping[tuple[Group, int], Sequence[float]],
    errors: Mapping[tuple[Group, int], Sequence[float]],
    buckets: int,
) -> LayerGains:
    """changed, errors: of the output and in the residual stream, by group and measured bucket, one for each method that
    was tried. Buckets without a measurement take those of the nearest one; groups in which nothing changed have 1.0.
    """
    logs: dict[int, dict[Group, float]] = {}
    for (group, bucket), values in changed.items():
        pairs = zip(values, errors[group, bucket], strict=True)
        own = [math.log(c / e) for c, e in pairs if c > 0 and e > 0]
        if own:
            logs.setdefault(bucket, {})[group] = sum(own) / len(own)
    found: dict[tuple[str, str, int, int], float] = {}
    for bucket in range(buckets) if logs else ():
        mine = logs[min(logs, key=lambda b: (abs(b - bucket), b))]
        mean = sum(v * len(g.layers) for g, v in mine.items()) / sum(len(g.layers) for g in mine)
        for group, value in mine.items():
            found |= {(group.component, group.kind, n, bucket): math.exp(value - mean) for n in group.layers}
    return found


def by_layer(records: Sequence[ProbeRecord], gains: LayerGains) -> list[ProbeRecord]:
    """The records, their residual errors counted by the gain of their layer."""
    return [replace(r, residual=r.residual * gains.get((r.component, r.kind, r.layer, r.bucket), 1.0)) for r in records]


def gains(changed: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
    """changed: of the output by method; errors: summed in the residual stream. 1.0 where one of them is zero."""
    logs = {m: math.log(c / errors[m]) for m, c in changed.items() if c > 0 and errors.get(m, 0.0) > 0}
    mean = sum(logs.values()) / max(len(logs), 1)
    limit = math.log(MOST)
    return {m: math.exp(min(max(logs[m] - mean, -limit), limit)) if m in logs else 1.0 for m in changed}


def by_method(records: Sequence[ProbeRecord], gain: Mapping[str, float]) -> list[ProbeRecord]:
    """The records of methods with a gain, their residual errors counted by it."""
    return [replace(r, residual=r.residual * gain[r.method]) for r in records if r.method in gain]


def counted_by(found: Found, gain: Mapping[str, float]) -> Found:
    """The methods with a gain alone, their errors counted by it."""
    methods = {n: m for n, m in found.methods.items() if n in gain}
    return replace(found, records=by_method(found.records, gain), methods=methods)


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
