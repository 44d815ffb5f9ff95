"""The ladder: recipes of several budgets beside plain ones, measured end to end; the measured winner goes on.

Once it is measured, the step weights may be fitted to it and the best budget allocated again; the new recipe is kept
only if it is measured to be better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from glocal.advise.effort import Effort, Target
from glocal.advise.recipe import Recipe
from glocal.advise.search import Found, Rung, allocated, published, single
from glocal.advise.weights import Weights, residual_under
from glocal.measure.stats import drift


@dataclass(frozen=True)
class Anchors:
    """Of one sample, or means over several: seconds of a dense run, and the two ends of the scale of drift.
    measures: of the floor.
    """

    seconds: float
    floor: float
    ceiling: float
    measures: Mapping[str, float]


def mean_anchors(found: Sequence[Anchors]) -> Anchors:
    """Means over samples."""
    measures = {name: fmean(a.measures[name] for a in found) for name in found[0].measures}
    seconds, floor, ceiling = (fmean(getattr(a, name) for a in found) for name in ("seconds", "floor", "ceiling"))
    return Anchors(seconds, floor, ceiling, measures)


def mean_rung(found: Sequence[Rung], ends: Sequence[Anchors]) -> Rung:
    """One recipe measured on several samples: means of seconds, errors and measures, and the worst drift of a sample
    between its own anchors.
    """
    measures = {name: fmean(r.measures[name] for r in found) for name in found[0].measures}
    parts = {name: fmean(getattr(r, name) for r in found) for name in ("seconds", "dense_seconds", "error")}
    worst = max(drift(r.error or 0.0, a.floor, a.ceiling) for r, a in zip(found, ends, strict=True))
    return replace(found[0], **parts, measures=measures, samples=len(found), worst=worst)


def refused(anchors: Anchors, target: Target) -> str | None:
    """Why no recipe can be judged here: changing the kernel does already too much."""
    if anchors.floor > anchors.ceiling / 5:
        return (
            f"Changing the dense kernel alone moves the result by {anchors.floor:.3g}, more than a fifth of another "
            f"seed ({anchors.ceiling:.3g}): no recipe can be judged on this model."
        )
    for name, limit in sorted(target.limits.items()):
        if name != "drift" and anchors.measures[name] > limit:
            return (
                f"Changing the dense kernel alone gives {name} {anchors.measures[name]:.3g}, above the limit "
                f"{limit:.3g} that is asked for."
            )
    return None


def build_ladder(found: Found, effort: Effort, shape: Sequence[int], levels: Sequence[float]) -> list[Rung]:
    """Allocations by residual and by relative error and the best single method at every budget, and published settings;
    each recipe once.
    """
    out: list[Rung] = []
    for budget in effort.budgets:
        made = allocated(found, budget), allocated(found, budget, "output"), single(found, budget)
        out += [rung for rung in made if rung is not None]
    if len(levels) > 2:
        out += published(found, shape, levels)[: effort.published]
    seen: set[str] = set()
    return [r for r in out if r.recipe.rules and not (r.recipe.id in seen or seen.add(r.recipe.id))]


def needed(target: Target) -> float:
    """The end-to-end speed-up that is asked for; at least not slower."""
    whole = target.of in ("end_to_end", "prefill")
    return target.speedup if target.speedup is not None and whole else 1.0


def winners(measured: Sequence[Rung], anchors: Anchors, target: Target) -> tuple[list[Rung], str]:
    """The measured winner, never the predicted one: the fastest rung within the limits that meets the target. As in the
    validation, the worst sample may drift twice as far as the limit on the mean.
    Behind it the steps down from it: slower rungs, each of less error than the one before. Of the allocations for one
    budget only the one of least error counts, as all were given the same time. Or none, and why.
    """
    limit = target.limits.get("drift", 0.10)

    def drift_of(rung: Rung) -> float:
        assert rung.error is not None
        return drift(rung.error, anchors.floor, anchors.ceiling)

    known = [r for r in measured if r.error is not None]
    others = {name: most for name, most in target.limits.items() if name != "drift"}
    within = [r for r in known if drift_of(r) <= limit and all(r.measures[n] <= most for n, most in others.items())]
    within = [r for r in within if r.worst is None or r.worst <= 2 * limit]
    fast = [r for r in within if r.speedup is not None and r.speedup >= max(needed(target), 1.0)]
    best_of = {r.budget: r for r in sorted(filter(by_item, fast), key=lambda r: r.error or 0.0, reverse=True)}
    fast = [r for r in fast if not by_item(r) or r is best_of[r.budget]]
    steps: list[Rung] = []
    for rung in sorted(fast, key=lambda r: r.speedup or 0.0, reverse=True):
        if not steps or (rung.error or 0.0) < (steps[-1].error or 0.0):
            steps.append(rung)
    if steps:
        return steps, ""
    if not within:
        best = min(known, key=drift_of, default=None)
        if best is None:
            return [], "No recipe could be made within the budgets."
        also = f", and of {', '.join(sorted(others))} as asked" if others else ""
        worst = "" if best.worst is None or best.samples < 2 else f", {best.worst:.3f} on the worst sample"
        least = f"{drift_of(best):.3f}{worst} ({best.name})"
        return [], f"The least drift of all recipes tried is {least}; the limit is {limit:.3f}{also}."
    top = max(within, key=lambda r: r.speedup or 0.0)
    return [], (
        f"Within the limits the fastest recipe reaches {top.speedup or 0:.2f}x end to end; "
        f"{max(needed(target), 1.0):.2f}x is needed."
    )


def by_item(rung: Rung) -> bool:
    """Whether each layer, head and step range was given a method of its own, by whichever error."""
    return rung.kind in ("allocation", "relative")


def rivals(measured: Sequence[Rung]) -> tuple[str, ...]:
    """At every budget, in words, which error the better allocation went by."""
    out = []
    for budget in dict.fromkeys(r.budget for r in measured if r.kind == "relative" and r.error is not None):
        known = [r for r in measured if r.budget == budget and by_item(r) and r.error is not None]
        ours, other = (
            min((r.error or 0.0 for r in known if r.kind == kind), default=None) for kind in ("allocation", "relative")
        )
        if ours is not None and other is not None:
            less = "relative" if other < ours else "residual"
            out.append(
                f"At {budget:.0%} of the attention time the allocation by {less} error errs less: measured {ours:.3g} "
                f"by residual error with step weights, {other:.3g} by relative error without."
            )
    return tuple(out)


EQUAL = 1.15  # errors of a few samples that differ by less say nothing about which recipe is better


def nearest(measured: Sequence[Rung]) -> list[Rung]:
    """Of the rungs faster than dense the one of least error, or the fastest of those that err alike."""
    faster = [r for r in measured if r.error is not None and (r.speedup or 0.0) > 1]
    least = min((r.error or 0.0 for r in faster), default=0.0)
    alike = [r for r in faster if (r.error or 0.0) <= EQUAL * least]
    return sorted(alike, key=lambda r: r.speedup or 0.0, reverse=True)[:1]


def corrected(found: Found, measured: Sequence[Rung], anchors: Anchors, target: Target) -> Rung | None:
    """The budget of the best rung allocated once more, with step weights fitted to the measured ladder; None where
    there is nothing to fit, or the same recipe comes out.
    """
    known = [r for r in measured if r.kind != "published" and r.error and r.predicted]
    best = winners(measured, anchors, target)[0] or nearest(measured)
    if len(known) < 2 or not best or best[0].budget is None:
        return None
    weights = refit(found, known)
    again = allocated(replace(found, weights=weights), best[0].budget)
    if again is None or again.recipe.id in {r.recipe.id for r in measured}:
        return None
    return replace(again, name=f"{again.name}, weights fitted to the ladder")


def refit(found: Found, known: Sequence[Rung], *, stiffness: float = 0.5, rounds: int = 20) -> Weights:
    """Step weights that predict the measured errors of `known` better: w_b f_b with log f_b small (Gauss-Newton on the
    logarithms of the errors). stiffness: how many measurements the wish for f = 1 counts as.
    """
    parts = torch.tensor([bucket_errors(found, r.recipe) for r in known], dtype=torch.float64)  # [rungs, buckets]
    wanted = torch.tensor([math.log(r.error or 1.0) for r in known], dtype=torch.float64)
    logs = torch.zeros(parts.shape[1], dtype=torch.float64)
    for _ in range(rounds):
        each = parts * logs.exp()
        total = each.sum(1).clamp(min=1e-30)
        slope = each / total[:, None]
        residual = wanted - total.log()
        normal = slope.T @ slope + stiffness * torch.eye(len(logs), dtype=torch.float64)
        logs = logs + torch.linalg.solve(normal, slope.T @ residual - stiffness * logs)
        logs = logs.clamp(-2, 2)
    factors = logs.exp().tolist()
    weight = tuple(w * f for w, f in zip(found.weights.weight, factors, strict=True))
    step = tuple(w * f for w, f in zip(found.weights.step, factors, strict=True))
    return replace(found.weights, weight=weight, step=step)


def bucket_errors(found: Found, recipe: Recipe) -> list[float]:
    """What each bucket adds to the predicted error of a recipe."""
    return [found.weights.weight[b.number] * residual_under(found.records, recipe, b) for b in found.buckets]
