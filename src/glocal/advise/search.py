"""Budgets turned into recipes, and recipes measured: the ladder in which plain recipes always compete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glocal.advise.allocate import Allocation, Item, allocate
from glocal.advise.apply import attach
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Latents, Output, main_error
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Phase, Recipe, Rule
from glocal.advise.structure import rules, simplify
from glocal.advise.timing import Times
from glocal.advise.validation import timed
from glocal.advise.weights import Bucket, Weights, residual_total, uniform_rule
from glocal.advise.workload import Sample

Kind = Literal["allocation", "single", "published"]


@dataclass(frozen=True)
class Rung:
    """One recipe of the ladder. budget: attention time over dense that it was made for. predicted: end-to-end error;
    seconds, dense_seconds, error: measured on one sample, None before.
    """

    name: str
    kind: Kind
    recipe: Recipe
    budget: float
    attention_ratio: float
    predicted: float
    seconds: float | None = None
    dense_seconds: float | None = None
    error: float | None = None

    @property
    def speedup(self) -> float | None:
        """End to end, of this one sample."""
        return None if self.seconds is None or self.dense_seconds is None else self.dense_seconds / self.seconds


def items(
    records: Sequence[ProbeRecord], times: Times, buckets: Sequence[Bucket], value: str = "residual"
) -> list[Item]:
    """One item for each (layer, head, bucket): squared error (the worst of steps, branches and samples) and seconds of
    every method over all steps of the bucket.
    """
    heads = 1 + max(r.head for r in records)
    worst: dict[tuple[int, int, int], dict[str, float]] = {}
    for r in records:
        if r.head >= 0:
            mine = worst.setdefault((r.layer, r.head, r.bucket), {})
            mine[r.method] = max(mine.get(r.method, 0.0), getattr(r, value) ** 2)
    out = []
    for (layer, head, bucket), errors in sorted(worst.items()):
        steps = buckets[bucket].steps
        seconds = {"dense": times.dense.median * steps / heads}
        seconds.update({name: times.methods[name].median * steps / heads for name in errors})
        out.append(Item(layer, head, bucket, {"dense": 0.0, **errors}, seconds))
    return out


def allocated(
    records: Sequence[ProbeRecord],
    times: Times,
    weights: Weights,
    methods: Mapping[str, MethodSpec],
    budget: float,
    *,
    value: str = "residual",
) -> Rung:
    """The allocation whose attention takes `budget` of the dense time."""
    table = items(records, times, weights.buckets, value)
    dense = sum(i.time["dense"] for i in table)
    found: Allocation = simplify(
        allocate(table, weights.weight, time_budget=budget * dense), table, weights.weight, time_budget=budget * dense
    )
    made = rules(found, table, weights.buckets, records)
    used = {r.use: methods[r.use] for r in made if r.use != "dense"}
    name = "allocation" if value == "residual" else "allocation by relative error"
    return Rung(name, "allocation", Recipe("candidate", used, made), budget, found.time / dense, found.error)


def single(
    records: Sequence[ProbeRecord],
    times: Times,
    weights: Weights,
    methods: Mapping[str, MethodSpec],
    budget: float,
    layers: int,
) -> Rung | None:
    """The best single method with dense early steps within `budget`; None if none is fast enough."""
    best: Rung | None = None
    total = sum(b.steps for b in weights.buckets)
    for name in methods:
        for dense_buckets in range(len(weights.buckets)):
            sparse = weights.buckets[dense_buckets:]
            share = sum(b.steps for b in sparse) / total
            ratio = 1 - share + share * times.ratio(name)
            if ratio > budget:
                continue
            error = sum(weights.weight[b.number] * residual_total(records, name, b.number) for b in sparse)
            if best is None or error < best.predicted:
                rule = uniform_rule(name, layers, Phase("sigma", 0.0, sparse[0].high))
                best = Rung(
                    f"{methods[name].words()}, {dense_buckets} of {len(weights.buckets)} step ranges dense",
                    "single",
                    Recipe("candidate", {name: methods[name]}, (rule,)),
                    budget,
                    ratio,
                    error,
                )
    return best


def published(
    records: Sequence[ProbeRecord], times: Times, weights: Weights, methods: Mapping[str, MethodSpec], layers: int
) -> list[Rung]:
    """What the papers run: Radial Attention with its first quarter of steps dense (arXiv 2506.19852), a neighbourhood
    of half an axis at every step (arXiv 2504.16922).
    """
    out = []
    total = sum(b.steps for b in weights.buckets)
    for system, quarter in (("radial", 1), ("gna", 0)):
        name = next((n for n, m in methods.items() if m.system == system), None)
        if name is None or name not in times.methods:
            continue
        skipped, dense_steps = 0, round(0.25 * total) if quarter else 0
        while skipped < len(weights.buckets) and sum(b.steps for b in weights.buckets[: skipped + 1]) <= dense_steps:
            skipped += 1
        sparse = weights.buckets[skipped:]
        share = sum(b.steps for b in sparse) / total
        rule = uniform_rule(name, layers, Phase("sigma", 0.0, sparse[0].high))
        error = sum(weights.weight[b.number] * residual_total(records, name, b.number) for b in sparse)
        ratio = 1 - share + share * times.ratio(name)
        recipe = Recipe("candidate", {name: methods[name]}, (rule,))
        out.append(Rung(f"{methods[name].words()}, as published", "published", recipe, ratio, ratio, error))
    return out


def measure_rung(model: Any, rung: Rung, sample: Sample, objective: Latents, dense: tuple[Output, float]) -> Rung:
    """Run the rung on a sample whose dense result and seconds are known."""
    with attach(model, rung.recipe):
        out, seconds = timed(lambda: objective.run(model, sample))
    return Rung(
        rung.name,
        rung.kind,
        rung.recipe,
        rung.budget,
        rung.attention_ratio,
        rung.predicted,
        seconds,
        dense[1],
        main_error(objective.distance(dense[0], out)),
    )


def covered_layers(made: Sequence[Rule]) -> int:
    """How many layers some rule makes sparse."""
    return len({n for r in made if r.use != "dense" for a, b in r.layers for n in range(a, b + 1)})
