"""Budgets turned into recipes, and recipes measured: the ladder in which plain recipes always compete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from glocal.advise.allocate import Items, allocate, evaluate
from glocal.advise.apply import attach
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Objective, Output, main_error, on_cpu
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Fallback, Phase, Recipe, Rule
from glocal.advise.rules import allocation_rules, layer_ranges, published_defaults
from glocal.advise.structure import Structure, simplify
from glocal.advise.timing import Times
from glocal.advise.validation import timed
from glocal.advise.weights import Bucket, Weights, even_weights, phase_of, residual_total
from glocal.advise.workload import Sample
from glocal.canvas import Canvas, Layout

Kind = Literal["allocation", "relative", "single", "published"]
Measure = Literal["residual", "output"]


@dataclass(frozen=True)
class Rung:
    """One recipe of the ladder. kind: "allocation" is by residual error, "relative" by relative error of the output.
    budget: attention time over dense that it was made for, attention_ratio: forecast of it, predicted: end-to-end
    error; None for published settings. seconds, dense_seconds, error: measured, means over `samples` samples; None
    before. worst: the largest drift of one of them.
    """

    name: str
    kind: Kind
    recipe: Recipe
    budget: float | None
    attention_ratio: float | None
    predicted: float | None
    seconds: float | None = None
    dense_seconds: float | None = None
    error: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    samples: int = 1
    worst: float | None = None

    @property
    def speedup(self) -> float | None:
        """End to end, of these samples."""
        return None if self.seconds is None or self.dense_seconds is None else self.dense_seconds / self.seconds


@dataclass(frozen=True, eq=False)
class Found:
    """What the search works on. base: one rule for each component and kind of site, with the layers it may touch.
    fallback: of every recipe it makes.
    """

    records: Sequence[ProbeRecord]
    times: Times
    weights: Weights
    methods: Mapping[str, MethodSpec]
    base: tuple[Rule, ...]
    fallback: Fallback

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The step ranges."""
        return self.weights.buckets

    @property
    def heads(self) -> int:
        """Heads of a site."""
        return 1 + max(r.head for r in self.records)

    def items(self, measure: Measure = "residual") -> Items:
        """One item for each layer, head and step range."""
        one = self.times.dense.median / self.heads

        def seconds(method: str, layer: int, bucket: int) -> float:
            return one * self.times.ratio(method) * self.buckets[bucket].steps

        items = Items.from_records(self.records, seconds, measure=measure)
        split = tuple(self.times.split * b.steps for b in self.buckets) if self.times.split else ()
        return replace(items, split=split)

    def recipe(self, methods: Sequence[str], rules: Sequence[Rule]) -> Recipe:
        """A recipe over these methods."""
        return Recipe("candidate", {m: self.methods[m] for m in methods}, tuple(rules), fallback=self.fallback)

    def uniform(self, method: str, sparse: Sequence[Bucket]) -> Recipe:
        """One method at all layers and heads, in the step ranges `sparse` (the last ones of the run)."""
        phase = phase_of(sparse[0].coordinate, 0.0, sparse[0].high)
        return self.recipe([method], [replace(rule, use=method, phase=phase) for rule in self.base])

    def uniform_error(self, method: str, sparse: Sequence[Bucket]) -> float:
        """Its predicted end-to-end error."""
        return sum(self.weights.weight[b.number] * residual_total(self.records, method, b.number) for b in sparse)

    def uniform_ratio(self, method: str, sparse: Sequence[Bucket]) -> float:
        """Its attention time over dense."""
        share = sum(b.steps for b in sparse) / sum(b.steps for b in self.buckets)
        return 1 - share + share * self.times.ratio(method)


def allocated(found: Found, budget: float, measure: Measure = "residual") -> Rung | None:
    """The allocation whose attention takes `budget` of the dense time, made simple enough to read; None if even the
    fastest methods take longer. measure: "residual" goes by step weights, "output" (relative error of the attention
    output) by none; what is predicted of either goes by residual error and step weights.
    """
    items = found.items(measure)
    limit = budget * items.dense_time
    if float(items.time.amin(1).sum()) > limit:
        return None
    weights, alike = torch.tensor(found.weights.weight, dtype=torch.float64), measure == "output"
    made = within(items, torch.ones_like(weights) if alike else weights, limit)
    predicted = evaluate(found.items(), made.choice, weights).error if alike else made.error
    seconds = made.time + items.split_time(made.choice)
    rules = allocation_rules(items, made, found.buckets)
    used = sorted({r.use for r in rules if r.use != "dense"})
    name = f"allocation{' by relative error' if alike else ''}, {budget:.0%} of the attention time"
    kind: Kind = "relative" if alike else "allocation"
    return Rung(name, kind, found.recipe(used, rules), budget, seconds / items.dense_time, predicted)


def of_range(found: Found, bucket: Bucket, budget: float) -> Recipe:
    """The allocation of one step range by itself at `budget` of its attention time (more, where even the fastest
    methods take longer), everything else dense.
    """
    own = [replace(r, bucket=0) for r in found.records if r.bucket == bucket.number]
    alone = replace(found, records=own, weights=even_weights([replace(bucket, number=0)]))
    items = alone.items()
    least = float(items.time.amin(1).sum()) / items.dense_time
    rung = allocated(alone, max(budget, least * (1 + 1e-9)))
    assert rung is not None
    return replace(rung.recipe, rules=tuple(replace(r, phase=bucket.phase) for r in rung.recipe.rules))


def within(items: Items, weights: Tensor, limit: float) -> Structure:
    """The allocation, made simple, whose items and further methods in a call together take `limit` seconds at most."""
    least, spare = float(items.time.amin(1).sum()), limit
    while True:
        made = simplify(items, allocate(items, weights, time_budget=spare), weights)
        over = made.time + items.split_time(made.choice) - limit
        if over <= 1e-9 * limit or spare <= least:
            return made
        spare = max(least, spare - over)


def single(found: Found, budget: float) -> Rung | None:
    """The best single method with dense early steps within `budget`; None if none is fast enough."""
    best: Rung | None = None
    for name in found.methods:
        for skipped in range(len(found.buckets)):
            sparse = found.buckets[skipped:]
            ratio, error = found.uniform_ratio(name, sparse), found.uniform_error(name, sparse)
            if ratio > budget or (best is not None and best.predicted is not None and error >= best.predicted):
                continue
            words = f"{found.methods[name].words()}, {skipped} of {len(found.buckets)} step ranges dense"
            best = Rung(words, "single", found.uniform(name, sparse), budget, ratio, error)
    return best


def published(found: Found, shape: Sequence[int], levels: Sequence[float]) -> list[Rung]:
    """What papers run on their models, carried over to this canvas and this run; measured, not predicted."""
    out = []
    most = 1 + max(last for rule in found.base for _, last in rule.layers)
    for plain in published_defaults(shape, most):
        rules = []
        for rule in plain.rules:
            for base in found.base:
                layers = layer_ranges([n for n in range(most) if rule.covers(n) and base.covers(n)])
                if layers:
                    rules.append(replace(base, use=rule.use, phase=_as_sigma(rule.phase, levels), layers=layers))
        if not rules:
            continue
        recipe = Recipe("candidate", {plain.method.id: plain.method}, tuple(rules), fallback=found.fallback)
        try:
            plain.method.plan(Layout.of(Canvas(tuple(shape))))
        except ValueError:  # a published setting that does not fit this canvas is no competitor
            continue
        out.append(Rung(plain.name, "published", recipe, None, None, None))
    return out


def _as_sigma(phase: Phase, levels: Sequence[float]) -> Phase:
    """A phase of progress as noise levels of a run."""
    if phase.coordinate != "progress":
        return phase
    steps = len(levels) - 1
    first, last = round(phase.low * steps), round(phase.high * steps)
    return Phase("sigma", levels[last], levels[first])


def base_rules(records: Sequence[ProbeRecord]) -> tuple[Rule, ...]:
    """One rule, dense as yet, for each component and kind of site among the records, over its layers."""
    layers: dict[tuple[str, str], set[int]] = {}
    for r in records:
        layers.setdefault((r.component, r.kind), set()).add(r.layer)
    found = []
    for (component, kind), own in sorted(layers.items()):
        site: Literal["self", "joint"] = "joint" if kind == "joint" else "self"
        found.append(Rule("dense", layer_ranges(sorted(own)), component=component, site=site))
    return tuple(found)


def measure_rung(model: Any, objective: Objective, rung: Rung, sample: Sample, dense: tuple[Output, float]) -> Rung:
    """Run the rung on a sample whose dense result (on the CPU) and seconds are known."""
    with attach(model, rung.recipe, on_unseen="run"):
        out, seconds = timed(lambda: objective.run(model, sample))
    measures = dict(objective.distance(dense[0], on_cpu(out)))
    return replace(rung, seconds=seconds, dense_seconds=dense[1], error=main_error(measures), measures=measures)
