"""Advice on captured q, k, v: operator figures only, so its recipe is never more than a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from glocal._progress import NoProgress, Progress
from glocal.advise.dropped import Dropped
from glocal.advise.inside import ready_for
from glocal.advise.methods import MethodSpec, candidates
from glocal.advise.objective import Operator, Output
from glocal.advise.recipe import Expected, Phase, Recipe, Rule
from glocal.advise.timing import MethodTime, time_methods
from glocal.advise.workload import Workload


@dataclass(frozen=True)
class OperatorRow:
    """One method at one captured call: its time, dense time (seconds), and errors of the attention output."""

    call: str
    layer: int
    method: str
    time: MethodTime
    dense: MethodTime
    measures: Mapping[str, float]

    @property
    def speedup(self) -> float:
        """Dense time over its own."""
        return self.dense.median / self.time.median


@dataclass(frozen=True)
class OperatorAdvice:
    """rows: every method at every call. dropped: methods that do not fit, and why. recipe: at every layer the fastest
    method whose relative error is at most `limit` at all its calls; status "candidate", or "dense" if there is none.
    """

    recipe: Recipe
    rows: tuple[OperatorRow, ...]
    methods: Mapping[str, MethodSpec]
    dropped: Mapping[str, str]
    limit: float


@torch.no_grad()
def advise_operator(
    workload: Workload, *, limit: float = 0.05, device: str = "cpu", rounds: int = 5, progress: Progress | None = None
) -> OperatorAdvice:
    """Time and judge every candidate on captured calls (`Workload.from_tensors`).

    limit: largest relative L2 error of the attention output a method of the recipe may have.
    """
    if not limit > 0:
        raise ValueError(f"limit={limit}; legal: above 0.")
    bar = NoProgress() if progress is None else progress
    objective = Operator(device)
    rows: list[OperatorRow] = []
    methods: dict[str, MethodSpec] = {}
    dropped: dict[str, str] = {}
    bar.stage("captured calls", len(workload.samples))
    for sample in workload.samples:
        q, k, v, call = objective.inputs(sample)
        failed, working = Dropped(), {}
        for method in candidates(call.layout.kv.grid.axes):
            ready = ready_for(failed, method.id, method, (q, k, v, call))
            if ready is not None:
                working[method.id] = ready
        dropped.update(failed.why)
        times = time_methods(q, k, v, call, working, rounds=rounds)
        dense = Output(objective.dense(q, k, v, call))
        for name, ready in working.items():
            sparse = Output(ready.method.run(q, k, v, call)[0])
            measures = objective.distance(dense, sparse)
            rows.append(OperatorRow(sample.id, call.site.layer, name, times.methods[name], times.dense, measures))
        methods.update({name: ready.method for name, ready in working.items()})
        bar.step()
    bar.close()
    return OperatorAdvice(_recipe(rows, methods, limit), tuple(rows), methods, dropped, limit)


def _recipe(rows: list[OperatorRow], methods: Mapping[str, MethodSpec], limit: float) -> Recipe:
    rules = []
    for layer in sorted({r.layer for r in rows}):
        found: dict[str, list[OperatorRow]] = {}
        for row in rows:
            if row.layer == layer:
                found.setdefault(row.method, []).append(row)
        calls = max(len(group) for group in found.values())
        fit = {
            name: group
            for name, group in found.items()
            if len(group) == calls and all(next(iter(r.measures.values())) <= limit and r.speedup > 1 for r in group)
        }
        if not fit:
            continue
        name = max(fit, key=lambda n: min(r.speedup for r in fit[n]))
        worst = max(next(iter(r.measures.values())) for r in fit[name])
        ratio = max(1 / r.speedup for r in fit[name])
        expected = Expected(kept=fit[name][0].time.kept, error=worst, time_ratio=ratio)
        rules.append(Rule(name, ((layer, layer),), "all", Phase(), expected=expected))
    used = {r.use: methods[r.use] for r in rules}
    return Recipe("candidate" if rules else "dense", used, tuple(rules))
