"""Operator and step times of the chosen recipe, measured after the forecast: interleaved with dense, one step a bucket."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


from glocal.adapt.attach import attach as attach_method
from glocal.advise.apply import RecipeMethod
from glocal.advise.objective import Latents
from glocal.advise.preflight import Stopwatch
from glocal.advise.recipe import Recipe
from glocal.advise.workload import Sample
from glocal.measure.stats import Interval, log_ratio
from glocal.models.generation import SampleStep


@dataclass(frozen=True)
class StepTime:
    """Seconds of every step of a run, dense and sparse, and inside them the attention. operator, step: speed-ups with
    intervals over (step, round) pairs."""

    dense: tuple[float, ...]
    sparse: tuple[float, ...]
    dense_attention: tuple[float, ...]
    sparse_attention: tuple[float, ...]
    operator: Interval
    step: Interval


def time_steps(
    model: Any,
    recipe: Recipe,
    sample: Sample,
    objective: Latents,
    *,
    rounds: int = 3,
) -> StepTime:
    """Time whole runs step by step, dense and sparse alternating. """
    found: dict[str, tuple[list[float], list[float]]] = {"dense": ([], []), "sparse": ([], [])}
    rounds = max(1, rounds // 3)
    for number in range(rounds):
        names = ("dense", "sparse") if number % 2 == 0 else ("sparse", "dense")
        for name in names:
            whole, inside = _one_run(model, recipe if name == "sparse" else None, sample, objective)
            found[name][0].extend(whole)
            found[name][1].extend(inside)
    dense, sparse = found["dense"], found["sparse"]
    return StepTime(
        tuple(dense[0]),
        tuple(sparse[0]),
        tuple(dense[1]),
        tuple(sparse[1]),
        log_ratio(dense[1], sparse[1]),
        log_ratio(dense[0], sparse[0]),
    )


def _one_run(
    model: Any, recipe: Recipe | None, sample: Sample, objective: Latents
) -> tuple[list[float], list[float]]:
    """Seconds of each step and of the attention in it."""
    watch, whole, inside = Stopwatch(), [], []
    handles = []
    if recipe is not None:
        handles.append(attach_method(model, RecipeMethod(recipe)))
    handles.append(attach_method(model, watch))
    last = time.perf_counter()

    def on_step(_: SampleStep) -> None:
        nonlocal last
        now = time.perf_counter()
        whole.append(now - last)
        inside.append(watch.seconds)
        watch.seconds, last = 0.0, now

    try:
        objective.run(model, sample, on_step=on_step)
    finally:
        for handle in reversed(handles):
            handle.undo()
    return whole, inside
