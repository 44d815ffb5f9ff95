"""`advise`: from a model and a workload to a recipe with evidence, or to "stay dense" and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from glocal._progress import NoProgress, Progress
from glocal.advise.dropped import Dropped, broken_records
from glocal.advise.effort import AdviseOptions, Effort, Target, effort_of, listed
from glocal.advise.farm import Farm, Task
from glocal.advise.forecast import check_budget, check_memory, measured_forecast
from glocal.advise.identity import components
from glocal.advise.inside import times_inside
from glocal.advise.ladder import (
    Anchors,
    build_ladder,
    corrected,
    mean_anchors,
    mean_rung,
    nearest,
    needed,
    refused,
    winners,
)
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Objective, Output
from glocal.advise.preflight import AdviceError, Preflight, preflight
from glocal.advise.probe import ProbeRecord, Shrunk
from glocal.advise.proof import Attempt, proven_on, with_origin
from glocal.advise.recipe import Fallback, Recipe
from glocal.advise.search import Found, Rung, base_rules, measure_rung
from glocal.advise.state import State
from glocal.advise.tasks import Looks, Probed, measure_anchors, probe_sample
from glocal.advise.timing import Times
from glocal.advise.validation import Validation, judged, run_pair, verdict_over
from glocal.advise.weights import (
    Bucket,
    StepWeight,
    Weights,
    fit_weights,
    make_buckets,
    one_bucket,
    residual_total,
    weight_run,
)
from glocal.advise.workload import Sample, Split, Workload

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Advice:
    """What `advise` found. Every number it holds was measured in this run or is named predicted.

    status: "validated" (at least 8 pairs accepted), "candidate" (accepted with fewer), "dense". reason: one sentence.
    rejected: recipes that failed validation before the chosen one was tried. stages: seconds spent by stage.
    shrunk: where the probe had to do with less memory.
    """

    recipe: Recipe
    status: Literal["validated", "candidate", "dense"]
    reason: str
    effort: Effort
    target: Target
    preflight: Preflight
    times: Times
    records: tuple[ProbeRecord, ...]
    dropped: Mapping[str, str]
    methods: Mapping[str, MethodSpec]
    weights: Weights | None = None
    ladder: tuple[Rung, ...] = ()
    chosen: Rung | None = None
    anchors: tuple[float, float] | None = None
    validation: Validation | None = None
    rejected: tuple[Attempt, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    shrunk: tuple[Shrunk, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether the recipe met every limit."""
        return self.status != "dense"


@dataclass
class Run:
    """What the stages share."""

    model: Any
    objective: Objective
    effort: Effort
    target: Target
    options: AdviseOptions
    progress: Progress
    state: State
    farm: Farm
    stages: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    name: str | None = None
    dropped: Dropped = field(default_factory=Dropped)

    def stage(self, name: str | None, steps: int | None = None) -> None:
        """End the running stage and begin another."""
        now = time.monotonic()
        if self.name is not None:
            self.stages[self.name] = now - self.began
        self.name, self.began = name, now
        if name is None:
            self.progress.close()
        else:
            self.progress.stage(name, steps)

    def once(self, name: str, function: Callable[..., T], *args: Any) -> T:
        """One part that runs here, whatever the number of processes: ``function(model, objective, *args)``."""
        return self.state.once(name, lambda: function(self.model, self.objective, *args))


def advise(
    model: Any,
    workload: Workload,
    *,
    objective: Objective,
    target: Target | None = None,
    effort: str | Effort = "standard",
    options: AdviseOptions | None = None,
    progress: Progress | None = None,
) -> Advice:
    """Find where sparse attention pays on `model`, prove it, or say why it does not.

    model: anything with a host adapter (`glocal.adapt.register_host`). workload: samples; probe, step-weight and
    validation samples are disjoint in arguments and seed. objective: how a sample runs and how outputs differ.
    With `options.state` finished samples are kept there, and `options.resume` goes on from them.
    Raises AdviceError where no advice is possible (the model does not reproduce itself, say), ValueError for arguments.
    """
    level = effort_of(effort)
    asked = AdviseOptions() if options is None else options
    wanted = Target() if target is None else target
    split = workload.split(probe=level.probes, weights=level.samples, validate=level.pairs, validations=level.rungs)
    split = split.sized(asked.canvases)
    state = State(asked.state, _job(model, workload, objective, level, wanted, asked), resume=asked.resume)
    bar = NoProgress() if progress is None else progress
    farm = Farm(model, objective, state, jobs=asked.jobs, loader=asked.loader, progress=bar)
    run = Run(model, objective, level, wanted, asked, bar, state, farm)
    try:
        with torch.no_grad(), farm:
            found = _advise(run, split)
    except (AdviceError, ValueError):  # going on would stop at the same place
        state.discard()
        raise
    splits = split.records(1 + len(found.rejected))
    levels, guidance = found.preflight.levels, objective.guidance
    origin = with_origin(found.recipe, model, (levels, guidance), (objective.name, wanted))
    return replace(found, recipe=origin.with_evidence(splits=splits))


def _job(
    model: Any, workload: Workload, objective: Objective, effort: Effort, target: Target, options: AdviseOptions
) -> dict[str, Any]:
    """What tells this run from others, for `State`."""
    known = [f"{c['name']} {c['weights_sha256']}" for c in components(model)]
    methods = [m.id for m in options.candidates] if options.candidates else list(options.methods)
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "weights": known,
        "workload": workload.hash(),
        "objective": repr(objective) if hasattr(objective, "__dataclass_fields__") else objective.name,
        "effort": repr(effort),
        "target": repr(target),
        "methods": methods,
        "keep_dense": list(options.keep_dense),
        "min_tokens": options.min_tokens,
        "sensitivity": options.sensitivity,
        "canvases": [dict(c) for c in options.canvases],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _advise(run: Run, split: Split) -> Advice:
    probe_sample_, objective, options = split.probe.samples[0], run.objective, run.options
    run.stage("preflight")
    before = run.once("preflight", lambda model, objective: preflight(model, probe_sample_, objective))
    _check_limits(run.target, before, objective)
    buckets = make_buckets(before.levels, run.effort.buckets, objective.coordinate)
    methods = {m.id: m for m in listed(options, before.shape, causal=before.causal)}
    if options.budget is not None and not options.resume:
        known = (before, run.effort, methods)
        stages = measured_forecast(run.model, probe_sample_, objective, known, len(split.validations), options.jobs)
        check_budget(stages, options.budget)
        check_memory(stages, run.model)

    run.stage("time model", len(methods))
    site = before.sites[len(before.sites) // 2].name
    timed = run.once("times", times_inside, probe_sample_, site, methods, run.effort.rounds)
    times = timed.times
    run.dropped.take(timed.dropped)
    methods = {n: m for n, m in methods.items() if n in times.methods}
    base = Advice(
        Recipe("dense"),
        "dense",
        "",
        run.effort,
        run.target,
        before,
        times,
        (),
        run.dropped.why,
        methods,
        stages=run.stages,
    )
    refusal = _refusal(run, before, times)
    if refusal is not None:
        run.stage(None)
        return replace(base, reason=refusal)

    plain = _plain(times, methods, run.effort.plain)
    probed, others = _probes(run, split, methods, plain, buckets)
    methods = {n: m for n, m in methods.items() if n not in run.dropped.why}
    plain = {n: m for n, m in plain.items() if n in methods}
    if not plain:
        raise AdviceError("Every method that was to give the step weights failed; see the errors of the candidates.")
    records = [r for p in (*probed, *others) for r in _kept(run, p.records) if r.method in methods]
    if not records:
        raise ValueError(f"keep_dense={list(options.keep_dense)!r} leaves no site to advise on.")
    shrunk = tuple(s for p in (*probed, *others) for s in p.shrunk)
    base = replace(base, records=tuple(records), shrunk=shrunk)

    fallback = Fallback(min_tokens=options.min_tokens)
    run.stage("step weights", len(buckets) * len(plain) * len(others))
    weights = _step_weights(run, split.weights, others, (buckets, plain, records, fallback))
    found = Found(records, times, weights, methods, base_rules(records), fallback)
    return _climbed(run, replace(base, weights=weights), found, split, probed)


def _probes(
    run: Run,
    split: Split,
    methods: Mapping[str, MethodSpec],
    plain: Mapping[str, MethodSpec],
    buckets: Sequence[Bucket],
) -> tuple[list[Probed], list[Probed]]:
    """Probe samples with every candidate, step-weight samples with the plain ones."""
    looks = Looks(tuple(buckets), run.effort.steps_a_bucket, run.effort.blocks, run.options.sensitivity)
    first = [Task(f"probe/{s.id}", probe_sample, (s, methods, looks)) for s in split.probe.samples]
    second = [Task(f"weights/{s.id}", probe_sample, (s, plain, looks)) for s in split.weights.samples]
    run.stage("probe", len(first) + len(second))
    found: list[Probed] = run.farm.map([*first, *second])
    for probed in found:
        for name, why in probed.errors.items():
            run.dropped.unfit(name, why)
    for name in sorted(broken_records([r for p in found for r in p.records])):
        run.dropped.fail(name, "the probe found NaN or infinity in its output")
    return found[: len(first)], found[len(first) :]


def _kept(run: Run, records: Sequence[ProbeRecord]) -> list[ProbeRecord]:
    """Records of the sites that may be touched."""
    return [r for r in records if not any(fnmatch(r.site, glob) for glob in run.options.keep_dense)]


def _step_weights(
    run: Run,
    samples: Workload,
    probed: Sequence[Probed],
    known: tuple[Sequence[Bucket], Mapping[str, MethodSpec], Sequence[ProbeRecord], Fallback],
) -> Weights:
    """One bucket sparse at a time, on every step-weight sample."""
    buckets, plain, records, fallback = known
    rules = base_rules(records)
    tasks, places = [], []
    for sample, dense in zip(samples.samples, probed, strict=True):
        for bucket in buckets:
            for name, method in plain.items():
                recipe = one_bucket(bucket, name, method, rules, fallback)
                reference = (dense.output, _latent(run, dense, bucket), dense.latents[bucket.first])
                task_name = f"bucket/{sample.id}-{bucket.number}-{name}"
                tasks.append(Task(task_name, weight_run, (sample, bucket, recipe, reference)))
                places.append((sample, bucket, name))
    ends = run.farm.map(tasks)
    runs = []
    for (sample, bucket, name), (end, one) in zip(places, ends, strict=True):
        mine = [r for r in records if r.sample == sample.id]
        runs.append(StepWeight(bucket.number, name, end, one, residual_total(mine, name, bucket.number)))
    return fit_weights(buckets, runs)


def _latent(run: Run, dense: Probed, bucket: Bucket) -> Tensor | None:
    """The latent before a bucket, for a model that can go on from it."""
    return dense.latents[bucket.first - 1] if run.objective.restart and bucket.first else None


def _climbed(run: Run, base: Advice, found: Found, split: Split, probed: Sequence[Probed]) -> Advice:
    """Measure the ladder on the probe samples, and prove the winner."""
    samples, before = split.probe.samples, base.preflight
    ladder = build_ladder(found, run.effort, before.shape, before.levels)
    run.stage("ladder", (len(ladder) + 1) * len(samples))
    ends: list[Anchors] = run.farm.map(
        [Task(f"anchors/{s.id}", measure_anchors, (s, p)) for s, p in zip(samples, probed, strict=True)]
    )
    anchors = mean_anchors(ends)
    base = replace(base, anchors=(anchors.floor, anchors.ceiling))
    why = refused(anchors, run.target)
    if why is not None:
        run.stage(None)
        return replace(base, reason=why)
    dense = [(s, (p.output, end.seconds)) for s, p, end in zip(samples, probed, ends, strict=True)]
    measured = _measure(run, ladder, dense)
    if run.effort.correct:
        more = corrected(found, measured, anchors, run.target)
        if more is not None:
            measured += _measure(run, [more], dense)
    base = replace(base, ladder=tuple(measured))
    steps, why = winners(measured, anchors, run.target)
    if not steps and run.effort.show:
        steps = nearest(measured)
    if not steps:
        run.stage(None)
        return replace(base, reason=why)
    return _validated(run, base, steps, split)


def _measure(run: Run, rungs: Sequence[Rung], dense: Sequence[tuple[Sample, tuple[Output, float]]]) -> list[Rung]:
    """The rungs that ran on every sample; a kernel may fail in any way, the report names it, and three such stop."""
    tasks, names = [], {}
    for rung in rungs:
        for sample, known in dense:
            tasks.append(Task(f"rung/{rung.recipe.id[:16]}-{sample.id}", measure_rung, (rung, sample, known)))
            names[tasks[-1].name] = rung.name
    failed: set[str] = set()

    def fail(task: Task, error: Exception) -> None:
        if names[task.name] not in failed:
            failed.add(names[task.name])
            run.dropped.fail(names[task.name], str(error))

    done = run.farm.map(tasks, fail=fail)
    each = [done[i : i + len(dense)] for i in range(0, len(done), len(dense))]
    return [mean_rung(own) for own in each if all(r is not None for r in own)]


def _validated(run: Run, base: Advice, steps: Sequence[Rung], split: Split) -> Advice:
    """The first of `steps` that is accepted, each on samples of its own; dense if none is."""
    attempts: list[Attempt] = []
    for number, (rung, fresh) in enumerate(zip(steps, split.validations, strict=False)):
        run.stage("validation" if not number else f"validation {number + 1}", len(fresh))
        pairs = [
            Task(f"pair/{rung.recipe.id[:16]}-{s.id}", run_pair, (i, s, rung.recipe))
            for i, s in enumerate(fresh.samples)
        ]
        found = verdict_over(run.farm.map(pairs), run.target)
        attempts.append(Attempt(replace(rung, recipe=proven_on(rung.recipe, found.places)), found))
        if found.verdict.accepted:
            break
    run.stage(None)
    last, before = attempts[-1], tuple(attempts[:-1])
    status, reason = judged(last.validation)
    if before:
        reason += f" {len(before)} faster recipe{'s' if len(before) > 1 else ''} failed on other samples."
    recipe = Recipe("dense", fallback=last.rung.recipe.fallback)
    if status != "dense":
        recipe = replace(last.rung.recipe, status=status)
    return replace(
        base,
        recipe=recipe,
        status=status,
        reason=reason,
        chosen=last.rung,
        validation=last.validation,
        rejected=before,
    )


def _check_limits(target: Target, before: Preflight, objective: Objective) -> None:
    """ValueError for a limit on what this objective does not measure, or measures the other way round."""
    legal = ["drift", *(name for name in before.measures if name not in objective.higher)]
    for name in target.limits:
        if name in objective.higher:
            raise ValueError(
                f"limits: {name!r} is better when higher, and a limit bounds from above; legal: {', '.join(legal)}."
            )
        if name not in legal:
            raise ValueError(f"limits: {objective.name} has no measure {name!r}; legal: {', '.join(legal)}.")


def _refusal(run: Run, before: Preflight, times: Times) -> str | None:
    wanted = needed(run.target)
    if before.tokens < run.options.min_tokens:
        return f"A call has {before.tokens} tokens; below {run.options.min_tokens} every method stays dense."
    if before.ceiling < max(wanted, 1.02):
        return (
            f"Attention is {before.share:.0%} of a forward, so no method can give more than {before.ceiling:.2f}x; "
            f"the target is {wanted:.2f}x."
        )
    if not times.methods or min(t.median for t in times.methods.values()) >= times.dense.median:
        return f"Every candidate is slower than the best dense kernel here ({times.dense.kernel})."
    return None


def _plain(times: Times, methods: Mapping[str, MethodSpec], count: int) -> dict[str, MethodSpec]:
    """Position methods of middling density, spread over what they keep."""
    ranked = sorted((n for n, m in methods.items() if m.kind == "pattern"), key=lambda n: times.methods[n].visited)
    middle = [n for n in ranked if 0.15 <= times.methods[n].visited <= 0.6]
    pool = middle if len(middle) >= count else ranked
    if not pool:
        raise AdviceError("No position method fits this canvas, so step weights cannot be measured.")
    places = sorted({round((i + 0.5) * len(pool) / count - 0.5) for i in range(count)})
    return {pool[p]: methods[pool[p]] for p in places}
