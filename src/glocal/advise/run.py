"""`advise`: from a model and a workload to a recipe with evidence, or to "stay dense" and why."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor

from glocal._progress import NoProgress, Progress
from glocal.adapt.attach import attach as attach_method
from glocal.advise.dropped import Dropped, broken, broken_records
from glocal.advise.effort import AdviseOptions, Effort, Target, effort_of, listed
from glocal.advise.forecast import check_budget, measured_forecast
from glocal.advise.identity import host_record
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Latents, Output, main_error
from glocal.advise.preflight import AdviceError, Inside, Preflight, preflight
from glocal.advise.probe import Probe, ProbeRecord, ProbeSpec
from glocal.advise.recipe import Fallback, Recipe
from glocal.advise.rules import layer_ranges
from glocal.advise.search import Found, Rung, allocated, measure_rung, published, single
from glocal.advise.timing import Times, time_methods
from glocal.advise.validation import Validation, judged, timed, validate_pairs
from glocal.advise.weights import Bucket, Weights, make_buckets, step_weights
from glocal.advise.workload import Sample, Split, Workload
from glocal.measure.stats import drift
from glocal.models.generation import SampleStep


@dataclass(frozen=True, eq=False)
class Attempt:
    """One recipe and its pairs."""

    rung: Rung
    validation: Validation


@dataclass(frozen=True, eq=False)
class Advice:
    """What `advise` found. Every number it holds was measured in this run or is named predicted.

    status: "validated" (at least 8 pairs accepted), "candidate" (accepted with fewer), "dense". reason: one sentence.
    rejected: recipes that failed validation before the chosen one was tried. stages: seconds spent by stage.
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

    @property
    def accepted(self) -> bool:
        """Whether the recipe met every limit."""
        return self.status != "dense"


@dataclass
class Run:
    """What the stages share."""

    model: Any
    objective: Latents
    effort: Effort
    target: Target
    options: AdviseOptions
    progress: Progress
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


def advise(
    model: Any,
    workload: Workload,
    *,
    objective: Latents,
    target: Target | None = None,
    effort: str | Effort = "standard",
    options: AdviseOptions | None = None,
    progress: Progress | None = None,
) -> Advice:
    """Find where sparse attention pays on `model`, prove it, or say why it does not.

    model: anything with a host adapter (`glocal.adapt.register_host`). workload: samples; probe, step-weight and
    validation samples are disjoint in arguments and seed. objective: how a sample runs and how outputs differ.
    Raises AdviceError where no advice is possible (the model does not reproduce itself, say), ValueError for arguments.
    """
    level = effort_of(effort)
    run = Run(
        model,
        objective,
        level,
        Target() if target is None else target,
        AdviseOptions() if options is None else options,
        NoProgress() if progress is None else progress,
    )
    split = workload.split(probe=1, weights=1, validate=level.pairs, validations=level.rungs)
    with torch.no_grad():
        found = _advise(run, split)
    splits = split.records(1 + len(found.rejected))
    return replace(found, recipe=with_origin(found.recipe, run).with_evidence(splits=splits))


def _advise(run: Run, split: Split) -> Advice:
    probe_sample, weight_sample = split.probe.samples[0], split.weights.samples[0]
    run.stage("preflight")
    before = preflight(run.model, probe_sample, run.objective)
    buckets = make_buckets(run.objective.levels, run.effort.buckets)
    methods = {m.id: m for m in listed(run.options, before.shape)}
    if run.options.budget is not None:
        stages = measured_forecast(
            run.model, probe_sample, run.objective, (before, run.effort, methods), len(split.validations)
        )
        check_budget(stages, run.options.budget)

    run.stage("time model", len(methods))
    times = times_inside(run, before, probe_sample, methods)
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
    run.stage("probe", 2 * (len(run.objective.levels) - 1))
    probed = _probe(run, probe_sample, methods, buckets)
    other = _probe(run, weight_sample, plain, buckets)
    methods = {n: m for n, m in methods.items() if n not in run.dropped.why}
    plain = {n: m for n, m in plain.items() if n in methods}
    if not plain:
        raise AdviceError("Every method that was to give the step weights failed; see the errors of the candidates.")
    records = [r for r in (*probed.records, *other.records) if r.method in methods]
    base = replace(base, records=tuple(records))

    run.stage("step weights", len(buckets) * len(plain))
    layers = tuple(sorted({r.layer for r in records}))
    fallback = Fallback(min_tokens=run.options.min_tokens)
    weights = step_weights(
        run.model,
        weight_sample,
        run.objective,
        buckets,
        plain,
        other.records,
        (other.output, other.latents),
        layers=layer_ranges(layers),
        fallback=fallback,
        advance=run.progress.step,
    )

    ladder = _ladder(run, Found(records, times, weights, methods, layers, fallback), before.shape)
    run.stage("ladder", len(ladder))
    dense, seconds = timed(lambda: run.objective.run(run.model, probe_sample))
    if not torch.equal(dense.tensor, probed.output.tensor):
        raise AdviceError("The probe changed the model's own output; the host adapter or the probe is at fault.")
    ceiling = main_error(run.objective.distance(dense, run.objective.ceiling(run.model, probe_sample)))
    measured = []
    for rung in ladder:
        try:
            measured.append(measure_rung(run.model, rung, probe_sample, run.objective, (dense, seconds)))
        except Exception as error:  # a kernel may fail in any way; the report names it, and three such stop
            run.dropped.fail(rung.name, str(error))
        run.progress.step()
    base = replace(base, weights=weights, ladder=tuple(measured), anchors=(0.0, ceiling))
    steps, why = _winners(run, measured, ceiling)
    if not steps and run.effort.show:
        steps = _nearest(measured)
    if not steps:
        run.stage(None)
        return replace(base, reason=why)
    return _validated(run, base, steps, split)


def _validated(run: Run, base: Advice, steps: Sequence[Rung], split: Split) -> Advice:
    """The first of `steps` that is accepted, each on samples of its own; dense if none is."""
    attempts: list[Attempt] = []
    for rung, fresh in zip(steps, split.validations, strict=False):
        chosen = replace(rung, recipe=with_canvas(rung.recipe, base.preflight))
        run.stage("validation" if not attempts else f"validation {len(attempts) + 1}", len(fresh))
        found = validate_pairs(
            run.model,
            chosen.recipe,
            fresh.samples,
            run.objective,
            limit=run.target.limits.get("drift", 0.10),
            target=needed(run.target),
            advance=run.progress.step,
        )
        attempts.append(Attempt(chosen, found))
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


def needed(target: Target) -> float:
    """The end-to-end speed-up that is asked for; at least not slower."""
    return target.speedup if target.speedup is not None and target.of == "end_to_end" else 1.0


def times_inside(run: Run, before: Preflight, sample: Sample, methods: Mapping[str, MethodSpec]) -> Times:
    """Timed inside the first call of the middle site at the last step; candidates that do not run go to `dropped`."""
    found: list[Times] = []
    site = before.sites[len(before.sites) // 2].name
    last = len(run.objective.levels) - 2

    def look(q: Tensor, k: Tensor, v: Tensor, call: Any) -> None:
        working = {name: m for name, m in methods.items() if _works(run.dropped, name, m, (q, k, v, call))}
        found.append(time_methods(q, k, v, call, working, rounds=run.effort.rounds))

    with attach_method(run.model, Inside(site, 0, look)):
        latent = run.objective.first_latent(run.model, sample) if last else None
        run.objective.run(run.model, sample, start=last, latent=latent)
    if not found:
        raise AdviceError(f"Site {site!r} was never called; the host adapter reports sites that do not run.")
    return found[0]


def _works(dropped: Dropped, name: str, method: MethodSpec, qkv: tuple[Tensor, Tensor, Tensor, Any]) -> bool:
    """Whether a candidate runs on a real call and gives numbers."""
    q, k, v, call = qkv
    try:
        method.plan(call.layout, q, k)
    except ValueError as error:  # does not fit this canvas
        dropped.unfit(name, str(error))
        return False
    try:
        wrong = broken(method.run(q, k, v, call.layout, call.site.scale)[0])
    except Exception as error:  # a kernel may fail in any way; the report names it, and three such stop
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        dropped.fail(name, wrong)
    return wrong is None


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


@dataclass(frozen=True, eq=False)
class _Probed:
    """What a dense run with the probe in it gave. latents: before every step, and the last one."""

    records: list[ProbeRecord]
    output: Output
    latents: list[Tensor]


def _probe(run: Run, sample: Sample, methods: Mapping[str, MethodSpec], buckets: Sequence[Bucket]) -> _Probed:
    bucket_of = {step: b.number for b in buckets for step in range(b.first, b.last + 1)}
    steps = frozenset(s for b in buckets for s in _pick(b, run.effort.steps_a_bucket))
    keep = run.options.keep_dense
    probe = Probe(ProbeSpec(methods, bucket_of.__getitem__, steps, run.effort.blocks, sample.id))
    latents = [run.objective.first_latent(run.model, sample)]

    def on_step(step: SampleStep) -> None:
        latents.append(step.latent.clone())
        run.progress.step()

    with attach_method(run.model, probe):
        output = run.objective.run(run.model, sample, on_step=on_step)
    for name, why in probe.errors.items():
        run.dropped.unfit(name, why)
    for name in sorted(broken_records(probe.records)):
        run.dropped.fail(name, "the probe found NaN or infinity in its output")
    records = [r for r in probe.records if not any(fnmatch(r.site, glob) for glob in keep)]
    if not records:
        raise ValueError(f"keep_dense={list(keep)!r} leaves no site to advise on.")
    return _Probed(records, output, latents)


def _pick(bucket: Bucket, count: int) -> list[int]:
    if count >= bucket.steps:
        return list(range(bucket.first, bucket.last + 1))
    return sorted({bucket.first + round(i * (bucket.steps - 1) / max(count - 1, 1)) for i in range(count)})


def _plain(times: Times, methods: Mapping[str, MethodSpec], count: int) -> dict[str, MethodSpec]:
    """Position methods of middling density, spread over what they keep."""
    ranked = sorted((n for n, m in methods.items() if m.kind == "pattern"), key=lambda n: times.methods[n].visited)
    middle = [n for n in ranked if 0.15 <= times.methods[n].visited <= 0.6]
    pool = middle if len(middle) >= count else ranked
    if not pool:
        raise AdviceError("No position method fits this canvas, so step weights cannot be measured.")
    places = sorted({round((i + 0.5) * len(pool) / count - 0.5) for i in range(count)})
    return {pool[p]: methods[pool[p]] for p in places}


def _ladder(run: Run, found: Found, shape: Sequence[int]) -> list[Rung]:
    out: list[Rung] = []
    for budget in run.effort.budgets:
        out += [rung for rung in (allocated(found, budget), single(found, budget)) if rung is not None]
    out += published(found, shape, run.objective.levels)[: run.effort.published]
    seen: set[str] = set()
    return [r for r in out if r.recipe.rules and not (r.recipe.id in seen or seen.add(r.recipe.id))]


def _winners(run: Run, measured: Sequence[Rung], ceiling: float) -> tuple[list[Rung], str]:
    """The measured winner, never the predicted one: the fastest rung within the drift limit that meets the target.
    Behind it the steps down from it: slower rungs, each of less error than the one before. Or none, and why.
    """
    limit = run.target.limits.get("drift", 0.10)
    within = [r for r in measured if r.error is not None and drift(r.error, 0.0, ceiling) <= limit]
    fast = [r for r in within if r.speedup is not None and r.speedup >= max(needed(run.target), 1.0)]
    steps: list[Rung] = []
    for rung in sorted(fast, key=lambda r: r.speedup or 0.0, reverse=True):
        if not steps or (rung.error or 0.0) < (steps[-1].error or 0.0):
            steps.append(rung)
    if steps:
        return steps, ""
    if not within:
        best = min(measured, key=lambda r: r.error if r.error is not None else float("inf"), default=None)
        if best is None or best.error is None:
            return [], "No recipe could be made within the budgets."
        return [], (
            f"The least drift of all recipes tried is {drift(best.error, 0.0, ceiling):.3f} ({best.name}); "
            f"the limit is {limit:.3f}."
        )
    top = max(within, key=lambda r: r.speedup or 0.0)
    return [], (
        f"Within the drift limit the fastest recipe reaches {top.speedup or 0:.2f}x end to end; "
        f"{max(needed(run.target), 1.0):.2f}x is needed."
    )


def _nearest(measured: Sequence[Rung]) -> list[Rung]:
    """The rung of least error among those faster than dense, if there is one."""
    faster = [r for r in measured if r.error is not None and (r.speedup or 0.0) > 1]
    return sorted(faster, key=lambda r: r.error or 0.0)[:1]


def with_canvas(recipe: Recipe, before: Preflight) -> Recipe:
    """The recipe, proven on the canvas of this preflight and no other."""
    shape = list(before.shape)
    return replace(
        recipe,
        workload={
            "canvases": [{"shape": shape, "before": 0, "after": before.tokens - int(torch.tensor(shape).prod())}],
            "batch": [1, 1],
            "tokens": [before.tokens, before.tokens],
        },
    )


def with_origin(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with the model it was proven on and what it was judged by."""
    objective = {"name": run.objective.name, "version": 1, "limits": dict(run.target.limits)}
    spec = run.objective.spec
    return replace(recipe, host=host_record(run.model, run.objective.levels, spec.guidance), objective=objective)
