"""An existing recipe, proven again: on other weights, another canvas, another device, and always on unseen samples."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from glocal._progress import NoProgress, Progress
from glocal.advise.advice import Advice
from glocal.advise.checked import check_limits, check_measured
from glocal.advise.effort import Effort, Target
from glocal.advise.inside import times_inside
from glocal.advise.objective import Objective
from glocal.advise.preflight import AdviceError, preflight
from glocal.advise.proof import proven_on, with_origin
from glocal.advise.recipe import Recipe
from glocal.advise.search import Rung
from glocal.advise.validation import judged, validate_pairs
from glocal.advise.workload import Workload


def validate(
    model: Any,
    recipe: Recipe,
    workload: Workload,
    *,
    objective: Objective,
    target: Target | None = None,
    pairs: int | None = None,
    progress: Progress | None = None,
) -> Advice:
    """Pairs of dense and sparse over samples the recipe has not seen, and the verdict over them.

    pairs: how many samples (at least 2); default 8, or all unseen ones if they are fewer. Samples that share arguments
    or a seed with the recipe's own splits are left out where the recipe remembers them. The recipe that comes back was
    proven on this workload's canvas and no other; a rejected one says dense everywhere, and `chosen` keeps the old.
    Raises ValueError for a recipe without rules and for too few unseen samples, AdviceError as `advise` does.
    """
    if not any(rule.use != "dense" for rule in recipe.rules):
        raise ValueError(f"recipe {recipe.id[:12]} has status {recipe.status!r} and no sparse rule: nothing to prove.")
    asked = Target() if target is None else target
    check_limits(objective, asked)
    fresh = _unseen(recipe, workload, pairs)
    effort = Effort("validate", pairs=len(fresh))
    bar = NoProgress() if progress is None else progress
    sample = fresh.samples[0]
    stages: dict[str, float] = {}
    with torch.no_grad():
        began = _stage(bar, stages, None, "preflight", 0.0)
        before = preflight(model, sample, objective)
        check_measured(asked, before, objective)
        unproven = replace(recipe, workload={}, host={})  # other weights are what it is proven on
        began = _stage(bar, stages, "preflight", "time model", began)
        site = before.sites[len(before.sites) // 2].name
        timed = times_inside(model, objective, sample, site, recipe.methods, effort.rounds, bar)
        if timed.dropped.why:
            name, why = next(iter(timed.dropped.why.items()))
            raise AdviceError(f"Method {name} of the recipe does not run on this model: {why}")
        began = _stage(bar, stages, "time model", "validation", began)
        found = validate_pairs(model, unproven, fresh.samples, objective, target=asked, advance=bar.step)
    _stage(bar, stages, "validation", None, began)
    proven = proven_on(unproven, found.places)
    status, reason = judged(found)
    judged_recipe = replace(proven, status=status) if status != "dense" else Recipe("dense", fallback=recipe.fallback)
    final = with_origin(judged_recipe, model, (before.levels, objective.guidance), (objective.name, asked))
    seen = {**recipe.evidence.get("splits", {}), "validate": fresh.records()}
    pairs_run = found.pairs
    anchors = (
        sum(p.floor for p in pairs_run) / len(pairs_run),
        sum(p.ceiling for p in pairs_run) / len(pairs_run),
    )
    return Advice(
        recipe=replace(final, evidence={"splits": seen, "proven_again": recipe.id}),
        status=status,
        reason=reason,
        effort=effort,
        target=asked,
        preflight=before,
        times=timed.times,
        records=(),
        dropped={},
        methods=recipe.methods,
        chosen=Rung("the given recipe", "allocation", proven, None, None, None),
        anchors=anchors,
        validation=found,
        stages=stages,
    )


def _stage(bar: Progress, stages: dict[str, float], ended: str | None, begun: str | None, since: float) -> float:
    """Note the seconds of one stage and begin the next; the time it begins."""
    now = time.monotonic()
    if ended is not None:
        stages[ended] = now - since
    if begun is None:
        bar.close()
    else:
        bar.stage(begun)
    return now


def _unseen(recipe: Recipe, workload: Workload, pairs: int | None) -> Workload:
    fresh = workload.unseen(recipe.evidence.get("splits", {}))
    count = 0 if fresh is None else len(fresh)
    wanted = min(count, 8) if pairs is None else pairs
    if wanted < 2 or fresh is None or count < wanted:
        asked = f"pairs={pairs}" if pairs is not None else "a validation"
        raise ValueError(
            f"{asked}: needs at least 2 unseen samples and as many as pairs; of {len(workload)} in the workload "
            f"{count} share neither arguments nor a seed with what the recipe was made or proven on. Give more samples."
        )
    return Workload(fresh.samples[:wanted])
