"""What `advise` will cost, stage by stage, from what the preflight measured: time, memory, disk, before they are spent.

Sparse runs are counted as slow as dense ones; what a probed call costs on top is measured on one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal._progress import NoProgress, Progress
from glocal.adapt.attach import attach
from glocal.adapt.records import Core, SiteCall
from glocal.advise.checked import check_measured, check_names
from glocal.advise.confirm import MOST
from glocal.advise.effort import AdviseOptions, Effort, Target, effort_of, listed
from glocal.advise.methods import MethodSpec
from glocal.advise.modelled import CALLS
from glocal.advise.objective import Objective
from glocal.advise.preflight import AdviceError, Inside, Preflight, preflight, synchronise, whole_memory
from glocal.advise.probe import Probe, ProbeSpec
from glocal.advise.weights import make_buckets
from glocal.advise.workload import Sample, Workload

ROW = 400  # bytes of one probe record as a line of JSON
RUNS_A_PAIR = 4  # dense, sparse, dense through another kernel, dense with another seed


@dataclass(frozen=True)
class StageForecast:
    """One stage: seconds, most bytes of memory (None: unknown here), bytes it will leave in the output folder."""

    name: str
    seconds: float
    memory: int | None
    disk: int


@dataclass(frozen=True)
class Cost:
    """What the stages are counted from beside the preflight. levels: noise levels of a run, one more than steps.
    candidates: methods probed. probe_call: extra seconds of one probed call. validations: recipes that can be validated
    at most, each on samples of its own. jobs: processes that share the samples.
    """

    levels: tuple[float, ...]
    candidates: int
    probe_call: float
    validations: int = 1
    jobs: int = 1


def forecast_stages(before: Preflight, effort: Effort, cost: Cost) -> tuple[StageForecast, ...]:
    """Every stage of `advise` in its order. Pure arithmetic; the preflight itself stands first, as it was paid."""
    steps, heads = len(cost.levels) - 1, sum(s.heads + 1 for s in before.sites)
    buckets = make_buckets(cost.levels, effort.buckets)
    run = steps * before.forward
    probed = sum(min(b.steps, effort.steps_a_bucket) for b in buckets)
    calls = probed * len(before.sites) * (effort.probes + effort.samples)  # the second ones with fewer candidates
    judged = effort.probes + (effort.samples if effort.wide else 0)
    rungs = 3 * len(effort.budgets) + effort.published
    one = before.sites[0]
    # Scores and their exponentials of one query block of at most 64 rows against all keys, fp32, all heads.
    scores = 2 * 4 * one.heads * 64 * before.tokens
    pairs = cost.validations * effort.pairs
    wide = (effort.probes + effort.samples) * cost.candidates
    records = round(probed * heads * wide) * ROW

    def stage(name: str, seconds: float, extra: int = 0, disk: int = 0) -> StageForecast:
        return StageForecast(name, seconds, None if before.memory is None else before.memory + extra, disk)

    call = before.attention / len(before.sites)
    # Every candidate runs once; some 40 calls at most are timed.
    timed = ((min(cost.candidates, CALLS + 8) + 2) * (effort.rounds + 1) + cost.candidates + 2) * call
    deals = min(MOST, len(before.sites) * effort.buckets)
    weights = effort.samples * len(effort.budgets) * sum(steps - b.first for b in buckets) * before.forward
    layers = min(len({(s.component, s.kind, s.layer) for s in before.sites}), effort.layers)
    layers *= effort.plain * min(effort.looks, len(buckets))
    each = sum(steps - b.first for b in buckets) / len(buckets) if before.tokens <= effort.reduced else 1
    proving = pairs * RUNS_A_PAIR * run
    probes, shared = effort.probes + effort.samples, max(cost.jobs, 1)
    probing = probes * run + calls * cost.probe_call
    return (
        stage("preflight", 6 * before.forward),
        stage("time model", before.forward + timed),
        stage("probe", probing / min(shared, probes), scores + (steps + 1) * before.output, 2 * records),
        stage("layers", layers * each * before.forward),
        stage("step weights", weights / shared, (steps + 1) * before.output),
        stage("ladder", judged * (3 + rungs) * run / min(shared, 3 + rungs), 2 * before.output),
        stage("confirm time", before.forward + (cost.validations + 1) * (deals + 1) * (effort.rounds + 2) * call),
        # Pictures of four pairs, two sides each, one byte a value where the result has four.
        stage("validation", proving / min(shared, effort.pairs), 3 * pairs * before.output, 2 * before.output),
    )


def measured_forecast(
    model: Any,
    sample: Sample,
    objective: Objective,
    known: tuple[Preflight, Effort, Mapping[str, MethodSpec]],
    validations: int = 1,
    jobs: int = 1,
) -> tuple[StageForecast, ...]:
    """The stages, with one probed call measured inside the last step of `sample`."""
    before, effort, methods = known
    seconds: list[float] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> None:
        probe = Probe(ProbeSpec(methods, lambda step: 0, frozenset([call.state.step]), effort.blocks))
        for _ in range(2):  # the first builds plans, which later calls of the same canvas find ready
            synchronise(q)
            began = time.perf_counter()
            probe.core(q, k, v, call, lambda q, k, v, call: q)
            synchronise(q)
            seconds.append(time.perf_counter() - began)

    with torch.no_grad(), attach(model, Inside(before.sites[len(before.sites) // 2].name, look)):
        objective.brief(model, sample)
    if not seconds:
        raise AdviceError("The middle site was never called; the host adapter reports sites that do not run.")
    return forecast_stages(before, effort, Cost(before.levels, len(methods), seconds[-1], validations, jobs))


def forecast_advice(
    model: Any,
    workload: Workload,
    *,
    objective: Objective,
    target: Target | None = None,
    effort: str | Effort = "standard",
    options: AdviseOptions | None = None,
    progress: Progress | None = None,
) -> tuple[StageForecast, ...]:
    """What `advise` with the same arguments would cost: runs the preflight and one probed call, nothing else.

    Raises what `advise` raises: AdviceError where the model cannot be advised on, ValueError for arguments.
    """
    level = effort_of(effort)
    asked = AdviseOptions() if options is None else options
    wanted = Target() if target is None else target
    check_names(model, objective, wanted, asked)
    shown = NoProgress() if progress is None else progress
    split = workload.split(probe=level.probes, weights=level.samples, validate=level.pairs, validations=level.rungs)
    sample = split.probe.samples[0]
    shown.stage("preflight")
    with torch.no_grad():
        before = preflight(model, sample, objective)
        check_measured(wanted, before, objective)
        methods = {m.id: m for m in listed(asked, before.shape, causal=before.causal)}
        known = (before, level, methods)
        found = measured_forecast(model, sample, objective, known, len(split.validations), asked.jobs)
    shown.close()
    return found


def total_seconds(stages: Sequence[StageForecast]) -> float:
    """Of all stages together."""
    return sum(s.seconds for s in stages)


def check_budget(stages: Sequence[StageForecast], budget: float) -> None:
    """AdviceError with the numbers if the stages take longer than `budget` seconds."""
    whole = total_seconds(stages)
    if whole > budget:
        most = max(stages, key=lambda s: s.seconds)
        raise AdviceError(
            f"The forecast is {duration(whole)}, the budget {duration(budget)}; {most.name} takes most of it "
            f"({duration(most.seconds)}). Nothing was written. Raise the budget, or take a smaller effort."
        )


def check_memory(stages: Sequence[StageForecast], model: Any) -> None:
    """AdviceError if a stage will hold more bytes than there are."""
    tensor = next((p for p in getattr(model, "parameters", list)()), torch.empty(0))
    there = whole_memory(tensor)
    most = max(stages, key=lambda s: -1 if s.memory is None else s.memory)
    if there is not None and most.memory is not None and most.memory > there:
        raise AdviceError(
            f"{most.name} will hold {most.memory / 2**30:.1f} GiB, here are {there / 2**30:.1f} GiB. Nothing was "
            "written. Take a smaller canvas, or a machine with more memory."
        )


def duration(seconds: float) -> str:
    """Seconds in words, such as 2.5 h, 40 min, 12 s."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def parse_duration(text: str, option: str) -> float:
    """Seconds of `6h`, `30m` or `90s`; ValueError in the words of the option."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{option} {text!r}; legal: a number with h, m or s, such as 6h, 30m or 90s.") from error
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{option} {text!r}; legal: a time above zero, such as 30m.")
    return seconds
