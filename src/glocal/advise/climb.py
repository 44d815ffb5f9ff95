"""The last stages of `advise`: the ladder is measured on the probe samples, and its winner proven on unseen ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from glocal.advise.advice import Advice, Run
from glocal.advise.confirm import Confirmed, confirm, deals, refined
from glocal.advise.farm import Task
from glocal.advise.ladder import (
    Anchors,
    build_ladder,
    corrected,
    mean_anchors,
    mean_rung,
    nearest,
    refused,
    winners,
)
from glocal.advise.objective import Output
from glocal.advise.preflight import Preflight
from glocal.advise.proof import Attempt, proven_on
from glocal.advise.recipe import Recipe
from glocal.advise.search import Found, Rung, allocated, measure_rung
from glocal.advise.tasks import Probed, measure_anchors
from glocal.advise.validation import judged, run_pair, verdict_over
from glocal.advise.workload import Sample, Split


def climbed(
    run: Run, base: Advice, found: Found, split: Split, probed: Sequence[Probed], others: Sequence[Probed] = ()
) -> Advice:
    """Measure the ladder on the probe samples (probed) and on those of the step weights (others, where they are to
    count), and prove the winner.
    """
    samples, before = (split.probe.samples + split.weights.samples)[: len(probed) + len(others)], base.preflight
    probed = [*probed, *others]
    found = _refined(run, found, before, samples[0])
    base = replace(base, times=found.times)
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
    measured = _measure(run, ladder, dense, ends)
    if run.effort.correct:
        more = corrected(found, measured, anchors, run.target)
        if more is not None:
            measured += _measure(run, [more], dense, ends)
    base = replace(base, ladder=tuple(measured))
    steps, why = winners(measured, anchors, run.target)
    if not steps and run.effort.show:
        steps = nearest(measured)
    if not steps:
        run.stage(None)
        return replace(base, reason=why)
    return _validated(run, base, steps, split, found)


def _refined(run: Run, found: Found, before: Preflight, sample: Sample) -> Found:
    """What further methods in a call cost, by the calls that an allocation makes: one mixed call alone says little."""
    first = next((r for r in (allocated(found, budget) for budget in run.effort.budgets) if r is not None), None)
    if first is None:
        return found
    run.stage("time model, mixed calls")
    return replace(found, times=refined(found.times, _confirmed(run, "mixed", first.recipe, before, found, sample)))


def _confirmed(run: Run, name: str, recipe: Recipe, before: Preflight, found: Found, sample: Sample) -> Confirmed:
    """The distinct calls of a recipe, timed at the site that the time model was timed at."""
    site = before.sites[len(before.sites) // 2].name
    known = recipe, deals(recipe, before.sites, found.buckets, before.tokens), found.times
    return run.once(f"{name}/{recipe.id[:16]}", confirm, sample, site, known, run.effort.rounds // 2 + 1)


def _measure(
    run: Run, rungs: Sequence[Rung], dense: Sequence[tuple[Sample, tuple[Output, float]]], ends: Sequence[Anchors]
) -> list[Rung]:
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
    return [mean_rung(own, ends) for own in each if all(r is not None for r in own)]


def _validated(run: Run, base: Advice, steps: Sequence[Rung], split: Split, found: Found) -> Advice:
    """The first of `steps` that is accepted, each on samples of its own; dense if none is. Before that the forecast of
    its attention time is replaced by measurement.
    """
    attempts: list[Attempt] = []
    confirmed = None
    for number, (rung, fresh) in enumerate(zip(steps, split.validations, strict=False)):
        run.stage("confirm time" if not number else f"confirm time {number + 1}")
        confirmed = _confirmed(run, "confirm", rung.recipe, base.preflight, found, split.probe.samples[0])
        run.stage("validation" if not number else f"validation {number + 1}", len(fresh))
        pairs = [
            Task(f"pair/{rung.recipe.id[:16]}-{s.id}", run_pair, (i, s, rung.recipe))
            for i, s in enumerate(fresh.samples)
        ]
        proof = verdict_over(run.farm.map(pairs), run.target)
        attempts.append(Attempt(replace(rung, recipe=proven_on(rung.recipe, proof.places)), proof))
        if proof.verdict.accepted:
            break
    run.stage(None)
    last, failed = attempts[-1], tuple(attempts[:-1])
    status, reason = judged(last.validation)
    if failed:
        reason += f" {len(failed)} faster recipe{'s' if len(failed) > 1 else ''} failed on other samples."
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
        rejected=failed,
        confirmed=confirmed,
    )
