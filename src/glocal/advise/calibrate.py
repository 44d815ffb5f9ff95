"""How far errors in the residual stream add up to a change of the model's output: gains of layers.

A layer's error is measured relative to the stream in front of it, and the stream grows from layer to layer, in the
first ones by a factor of ten: the same relative error there is soon a small one. And later steps make more of the
errors of some layers than of others. So one layer at a time runs sparse in one range of steps; the change at the end
of the run (where that is too dear: behind one step) over the error in that layer is the layer's gain, and probe
records count by it. The gains of all layers of a step range are scaled to a geometric mean of one: step weights say
the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from glocal.advise.apply import attach
from glocal.advise.objective import Objective
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Phase, Recipe, Rule
from glocal.advise.rules import layer_ranges
from glocal.advise.workload import Sample


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
