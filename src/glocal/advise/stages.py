"""The middle stages of `advise`: samples probed, one layer sparse at a time, one step range sparse at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from torch import Tensor

from glocal.advise.advice import Run
from glocal.advise.calibrate import (
    Group,
    LayerGains,
    by_layer,
    layer_gains,
    layer_groups,
    step_error,
    summed,
)
from glocal.advise.dropped import broken_records
from glocal.advise.farm import Task
from glocal.advise.methods import MethodSpec
from glocal.advise.preflight import AdviceError, Preflight
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Fallback, Phase, Recipe
from glocal.advise.reduced import agree, reduced_sample
from glocal.advise.search import Found, base_rules, of_range
from glocal.advise.tasks import Looks, Probed, probe_sample
from glocal.advise.timing import Times
from glocal.advise.weights import (
    Bucket,
    StepWeight,
    Weights,
    end_error,
    fit_weights,
    phase_of,
    residual_total,
    residual_under,
    weight_run,
)
from glocal.advise.workload import Sample


def measured_layers(
    run: Run,
    known: tuple[Sample, Probed],
    before: Preflight,
    about: tuple[Sequence[Bucket], Mapping[str, MethodSpec], Sequence[ProbeRecord]],
) -> LayerGains:
    """Gains of layers, for each of them, plain method and measured step range: by what is left at the end of the run
    (`_to_the_end`), else by one step of the whole model. Errors that gradients weigh say already what they do to the
    output, so all gains are one there.
    """
    (sample, probed), (buckets, plain, records) = known, about
    if run.options.sensitivity == "gradient":
        return {}
    groups, base = layer_groups(records, run.effort.layers), base_rules(records)
    to_the_end, looked = _to_the_end(run, before), _looked(run, probed, buckets)
    run.stage("layers", len(groups) * len(plain) * len(looked))
    changed: dict[tuple[Group, int], list[float]] = {}
    errors: dict[tuple[Group, int], list[float]] = {}
    tasks, places = [], []
    for bucket, step in looked:
        phase, at = _step(run, before, probed, bucket, step)
        reference = (probed.output, _latent(run, probed, bucket), probed.latents[bucket.first])
        for number, group in enumerate(groups):
            own = [r for r in records if group.holds(r)]
            for name, method in plain.items():
                rules = tuple(group.rules(base, name, bucket.phase if to_the_end else phase))
                recipe = Recipe("candidate", {name: method}, rules, fallback=Fallback(run.options.min_tokens))
                if to_the_end:
                    task = Task(f"layer/{step}-{number}-{name}", end_error, (sample, bucket, recipe, reference))
                    error = residual_total(own, name, bucket.number)
                else:
                    task = Task(f"layer/{step}-{number}-{name}", step_error, (sample, recipe, at))
                    error = summed(own, name, step, sample.id)
                tasks.append(task)
                places.append((group, bucket.number))
                errors.setdefault(places[-1], []).append(error)
    for place, value in zip(places, run.farm.map(tasks), strict=True):
        changed.setdefault(place, []).append(value)
    return layer_gains(changed, errors, len(buckets))


def _to_the_end(run: Run, before: Preflight) -> bool:
    """Whether layers are measured at the end of the run: layers differ in what the later steps make of their errors.
    Not on a canvas that step weights are reduced for, where it would take days.
    """
    return run.objective.restart and before.tokens <= run.effort.reduced


def _looked(run: Run, probed: Probed, buckets: Sequence[Bucket]) -> list[tuple[Bucket, int]]:
    """Step ranges in which layers are measured, spread over the run, each with a probed step; the first one alone where
    a run cannot be taken up.
    """
    count = min(run.effort.looks, len(probed.steps)) if run.objective.restart else 1
    first = 0.5 if run.objective.restart else 0.0
    places = [round((i + first) * len(probed.steps) / count - first) for i in range(count)]
    steps = {b: s for s in (probed.steps[p] for p in places) for b in buckets if b.first <= s <= b.last}
    return list(steps.items())


def _step(
    run: Run, before: Preflight, probed: Probed, bucket: Bucket, step: int
) -> tuple[Phase, tuple[int, Tensor | None, Tensor]]:
    """One step as a phase, and the dense run around it, as `step_error` wants it."""
    levels, again = before.levels, run.objective.restart and step
    phase = phase_of(bucket.coordinate, levels[step + 1], levels[step])
    return phase, (step, probed.latents[step - 1] if again else None, probed.latents[step])


def probes(
    run: Run, name: str, samples: Sequence[Sample], methods: Mapping[str, MethodSpec], buckets: Sequence[Bucket]
) -> list[Probed]:
    """Samples run dense with these candidates measured inside; those that do not fit or break are dropped."""
    found = _probed(run, name, samples, methods, buckets)
    for probed in found:
        for method, why in probed.errors.items():
            run.dropped.unfit(method, why)
    for method in sorted(broken_records([r for p in found for r in p.records])):
        run.dropped.fail(method, "the probe found NaN or infinity in its output")
    return found


def _probed(
    run: Run, name: str, samples: Sequence[Sample], methods: Mapping[str, MethodSpec], buckets: Sequence[Bucket]
) -> list[Probed]:
    looks = Looks(tuple(buckets), run.effort.steps_a_bucket, run.effort.blocks, run.options.sensitivity)
    return run.farm.map([Task(f"{name}/{s.id}", probe_sample, (s, methods, looks)) for s in samples])


def kept(run: Run, records: Sequence[ProbeRecord]) -> list[ProbeRecord]:
    """Records of the sites that may be touched."""
    return [r for r in records if not any(fnmatch(r.site, glob) for glob in run.options.keep_dense)]


def step_weights(
    run: Run, samples: Sequence[Sample], before: Preflight, found: Found, layers: LayerGains
) -> tuple[Weights, list[Probed]]:
    """One step range sparse at a time, by its own allocation at every budget, on every step-weight sample; on a reduced
    canvas where that says the same. And those samples, probed.
    """
    buckets = found.buckets
    recipes = {b: [of_range(found, b, budget) for budget in run.effort.budgets] for b in buckets}
    used = {name: method for some in recipes.values() for r in some for name, method in r.methods.items()}
    run.stage("step weights", len(samples) + sum(map(len, recipes.values())) * len(samples))
    probed = probes(run, "weights", samples, used, buckets)

    def measured(where: Sequence[tuple[Sample, Probed]], which: Sequence[Bucket]) -> list[StepWeight]:
        tasks, places = [], []
        for sample, dense in where:
            own = by_layer(kept(run, dense.records), layers)
            for bucket in which:
                for number, recipe in enumerate(recipes[bucket]):
                    reference = (dense.output, _latent(run, dense, bucket), dense.latents[bucket.first])
                    task_name = f"bucket/{sample.id}-{bucket.number}-{number}"
                    tasks.append(Task(task_name, weight_run, (sample, bucket, recipe, reference)))
                    words = f"allocation, {run.effort.budgets[number]:.0%} of the attention time"
                    places.append((bucket.number, words, residual_under(own, recipe, bucket)))
        ends = run.farm.map(tasks)
        return [StepWeight(n, name, end, one, total) for (n, name, total), (end, one) in zip(places, ends, strict=True)]

    full = list(zip(samples, probed, strict=True))
    small = _reduced(run, samples, before, used, buckets)
    if small is None or len(buckets) < 3:
        return fit_weights(buckets, measured(full, buckets)), probed
    runs = measured(small, buckets)
    ends = measured(full, [buckets[0], buckets[-1]])
    middle = buckets[1:-1]
    if agree(ends, runs):
        return fit_weights(buckets, ends + [r for r in runs if r.bucket in {b.number for b in middle}]), probed
    return fit_weights(buckets, ends + measured(full, middle)), probed


def _reduced(
    run: Run,
    samples: Sequence[Sample],
    before: Preflight,
    methods: Mapping[str, MethodSpec],
    buckets: Sequence[Bucket],
) -> list[tuple[Sample, Probed]] | None:
    """The step-weight samples on a reduced canvas, probed; None where the canvas is small or cannot be told, or where
    a method does not fit the reduced one.
    """
    sizes = getattr(run.objective, "sizes", None)
    if sizes is None:
        return None
    made = [reduced_sample(s, sizes(s), before.shape, run.effort.reduced) for s in samples]
    small = [s for s in made if s is not None]
    if not small or len(small) < len(made):
        return None
    probed = _probed(run, "weights", small, methods, buckets)
    return None if any(p.errors for p in probed) else list(zip(small, probed, strict=True))


def _latent(run: Run, dense: Probed, bucket: Bucket) -> Tensor | None:
    """The latent before a bucket, for a model that can go on from it."""
    return dense.latents[bucket.first - 1] if run.objective.restart and bucket.first else None


def plain_methods(times: Times, methods: Mapping[str, MethodSpec], count: int) -> dict[str, MethodSpec]:
    """Position methods of middling density that leave something out, spread over what they keep."""
    patterns = [n for n, m in methods.items() if m.kind == "pattern" and times.methods[n].kept < 1]
    ranked = sorted(patterns, key=lambda n: times.methods[n].visited)
    middle = [n for n in ranked if 0.15 <= times.methods[n].visited <= 0.6]
    pool = middle if len(middle) >= count else ranked
    if not pool:
        raise AdviceError("No position method fits this canvas, so step weights cannot be measured.")
    places = sorted({round((i + 0.5) * len(pool) / count - 0.5) for i in range(count)})
    return {pool[p]: methods[pool[p]] for p in places}
