"""An existing recipe, proven again: on other weights, another canvas, another device, and always on unseen samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from glocal._progress import NoProgress, Progress
from glocal.advise.effort import AdviseOptions, Effort, Target
from glocal.advise.objective import Latents, main_error
from glocal.advise.preflight import AdviceError, preflight
from glocal.advise.recipe import Recipe
from glocal.advise.run import Advice, Run, needed, times_inside, with_canvas, with_origin
from glocal.advise.search import Rung
from glocal.advise.validation import judged, validate_pairs
from glocal.advise.workload import Workload


def validate(
    model: Any,
    recipe: Recipe,
    workload: Workload,
    *,
    objective: Latents,
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
    fresh = _unseen(recipe, workload, pairs)
    effort = Effort("validate", pairs=len(fresh))
    asked = Target() if target is None else target
    run = Run(model, objective, effort, asked, AdviseOptions(), NoProgress() if progress is None else progress)
    sample = fresh.samples[0]
    with torch.no_grad():
        run.stage("preflight")
        before = preflight(model, sample, objective)
        proven = replace(with_canvas(recipe, before), host={})  # other weights are what it is proven on
        run.stage("time model", len(recipe.methods))
        times = times_inside(run, before, sample, recipe.methods)
        if run.dropped.why:
            name, why = next(iter(run.dropped.why.items()))
            raise AdviceError(f"Method {name} of the recipe does not run on this model: {why}")
        run.stage("validation", len(fresh))
        found = validate_pairs(
            model,
            proven,
            fresh.samples,
            objective,
            limit=asked.limits.get("drift", 0.10),
            target=needed(asked),
            advance=run.progress.step,
        )
        ceiling = main_error(objective.distance(found.outputs[sample.id][0], objective.ceiling(model, sample)))
    run.stage(None)
    status, reason = judged(found)
    judged_recipe = replace(proven, status=status) if status != "dense" else Recipe("dense", fallback=recipe.fallback)
    final = with_origin(judged_recipe, run)
    seen = {**recipe.evidence.get("splits", {}), "validate": fresh.records()}
    return Advice(
        recipe=replace(final, evidence={"splits": seen, "proven_again": recipe.id}),
        status=status,
        reason=reason,
        effort=effort,
        target=asked,
        preflight=before,
        times=times,
        records=(),
        dropped={},
        methods=recipe.methods,
        chosen=Rung("the given recipe", "allocation", proven, None, None, None),
        anchors=(0.0, ceiling),
        validation=found,
        stages=run.stages,
    )


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
