"""What exporters share: the result, rules in a row, and phases as shares of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glocal.advise.recipe import Phase, Recipe, RecipeError, Rule


@dataclass(frozen=True)
class Exported:
    """content: what the target reads. lost: what it cannot say, one sentence each."""

    content: Mapping[str, Any]
    lost: tuple[str, ...]


def sparse_rules(recipe: Recipe, target: str) -> list[tuple[int, Rule]]:
    """Rules that are not dense, with their numbers; RecipeError for a recipe without any."""
    found = [(number, rule) for number, rule in enumerate(recipe.rules) if rule.use != "dense"]
    if not found:
        raise RecipeError(f"{target}: the recipe has status {recipe.status!r} and no sparse rule; nothing to export.")
    return found


def refuse(target: str, number: int, why: str) -> RecipeError:
    """The error of a rule that the target cannot say."""
    return RecipeError(f"{target}: rules[{number}] {why}")


def steps_of(recipe: Recipe) -> int | None:
    """Steps of the run the recipe was proven on."""
    sigmas = recipe.host.get("scheduler", {}).get("sigmas", [])
    return len(sigmas) - 1 if len(sigmas) > 1 else None


def as_progress(recipe: Recipe, phase: Phase, target: str, number: int) -> tuple[float, float]:
    """A phase as a half-open share of the run; noise levels by the schedule the recipe was proven on."""
    if phase.coordinate == "always":
        return 0.0, 1.0
    if phase.coordinate == "progress":
        return phase.low, phase.high
    sigmas = recipe.host.get("scheduler", {}).get("sigmas", [])
    if phase.coordinate != "sigma" or len(sigmas) < 2:
        raise refuse(
            target,
            number,
            f"holds for {phase.coordinate} {phase.low:g} to {phase.high:g}, and the recipe names no schedule that says "
            "which steps those are.",
        )
    steps = len(sigmas) - 1
    inside = [n for n in range(steps) if phase.holds(sigma=sigmas[n], progress=None)]
    if not inside:
        raise refuse(target, number, f"holds at no step of the {steps} the recipe was proven on.")
    return inside[0] / steps, (inside[-1] + 1) / steps


def layers_of(recipe: Recipe, component: str) -> int | None:
    """How many layers with attention sites a component has."""
    for known in recipe.host.get("components", []):
        if known.get("name") == component and known.get("layers") is not None:
            return int(known["layers"])
    return None
