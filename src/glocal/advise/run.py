"""`advise`: from a model and a workload to a recipe with evidence, or to "stay dense" and why."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from glocal._progress import NoProgress, Progress
from glocal.advise.advice import Advice, Run
from glocal.advise.calibrate import by_layer
from glocal.advise.calibrated import calibrated
from glocal.advise.checked import check_measured, check_names
from glocal.advise.climb import climbed
from glocal.advise.effort import AdviseOptions, Effort, Target, effort_of, listed
from glocal.advise.farm import Farm
from glocal.advise.forecast import check_budget, check_memory, measured_forecast
from glocal.advise.identity import components
from glocal.advise.inside import times_inside
from glocal.advise.ladder import needed
from glocal.advise.objective import Objective
from glocal.advise.preflight import AdviceError, Preflight, preflight
from glocal.advise.proof import with_origin
from glocal.advise.recipe import Fallback, Recipe
from glocal.advise.search import Found, base_rules
from glocal.advise.stages import kept, measured_layers, plain_methods, probes, step_weights
from glocal.advise.state import State
from glocal.advise.timing import Times
from glocal.advise.weights import even_weights, make_buckets
from glocal.advise.workload import Split, Workload


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
    check_names(model, objective, wanted, asked)
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
        "objective": _told(objective),
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


def _told(objective: Objective) -> str:
    """An objective in words that are the same in every process: functions by name, not by where they lie."""
    if not is_dataclass(objective):
        return f"{type(objective).__qualname__} {objective.name}"
    found = {}
    for part in fields(objective):
        value = getattr(objective, part.name)
        named = value if hasattr(value, "__qualname__") else type(value)
        found[part.name] = named.__qualname__ if callable(value) else repr(value)
    return f"{type(objective).__qualname__}({', '.join(f'{n}={v}' for n, v in found.items())})"


def _advise(run: Run, split: Split) -> Advice:
    probe_sample_, objective, options = split.probe.samples[0], run.objective, run.options
    run.stage("preflight")
    before = run.once("preflight", lambda model, objective: preflight(model, probe_sample_, objective))
    check_measured(run.target, before, objective)
    buckets = make_buckets(before.levels, run.effort.buckets, objective.coordinate)
    methods = {m.id: m for m in listed(options, before.shape, causal=before.causal)}
    if options.budget is not None and not options.resume:
        known = (before, run.effort, methods)
        stages = measured_forecast(run.model, probe_sample_, objective, known, len(split.validations), options.jobs)
        check_budget(stages, options.budget)
        check_memory(stages, run.model)

    if "paro" in options.methods:
        run.stage("axis orders and masks")
        folder = Path(mkdtemp(prefix="glocal-masks-")) if options.state is None else options.state / "masks"
        methods |= {m.id: m for m in run.once("paro", calibrated, probe_sample_, folder)}
    run.stage("time model", len(methods))
    site = before.sites[len(before.sites) // 2].name
    if run.state.has("times"):
        run.progress.step(len(methods))
    timed = run.once("times", times_inside, probe_sample_, site, methods, run.effort.rounds, run.progress)
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

    plain = plain_methods(times, methods, run.effort.plain)
    run.stage("probe", len(split.probe.samples))
    probed = probes(run, "probe", split.probe.samples, methods, buckets)
    methods = {n: m for n, m in methods.items() if n not in run.dropped.why}
    plain = {n: m for n, m in plain.items() if n in methods}
    if not plain:
        raise AdviceError("Every method that was to give the gains of layers failed; see the errors of the candidates.")
    records = [r for p in probed for r in kept(run, p.records) if r.method in methods]
    base = replace(base, records=tuple(records), shrunk=tuple(s for p in probed for s in p.shrunk))

    known = (probe_sample_, probed[0])
    own = [r for r in records if r.sample == probe_sample_.id]
    layers = measured_layers(run, known, before, (buckets, plain, own))
    fallback = Fallback(min_tokens=options.min_tokens)
    counted = by_layer(records, layers)
    found = Found(counted, times, even_weights(buckets), methods, base_rules(records), fallback)
    refusal = _refusal(run, before, replace(times, methods={n: times.methods[n] for n in methods}))
    if refusal is not None:  # what was faster than dense was dropped
        run.stage(None)
        return replace(base, reason=refusal)

    weights, others = step_weights(run, split.weights.samples, before, found, layers)
    everything = tuple(r for p in (*probed, *others) for r in kept(run, p.records))
    shrunk = tuple(s for p in (*probed, *others) for s in p.shrunk)
    base = replace(base, records=everything, shrunk=shrunk, weights=weights, layers=layers)
    more = others if run.effort.wide else ()
    return climbed(run, base, replace(found, weights=weights), split, probed, more)


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
