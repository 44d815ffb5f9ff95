"""What a recipe was proven on: canvases, batch, model, objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from glocal.advise.effort import Target
from glocal.advise.identity import host_record
from glocal.advise.preflight import Place
from glocal.advise.recipe import Recipe
from glocal.advise.search import Rung
from glocal.advise.validation import Validation


@dataclass(frozen=True, eq=False)
class Attempt:
    """One recipe and its pairs."""

    rung: Rung
    validation: Validation


def proven_on(recipe: Recipe, places: Sequence[Place]) -> Recipe:
    """The recipe, proven on these canvases and no other."""
    canvases: dict[tuple[tuple[int, ...], int], dict[str, Any]] = {}
    for place in places:
        key = (place.shape, place.before)
        known = canvases.setdefault(key, {"shape": list(place.shape), "before": place.before, "after": place.after})
        known["after"] = max(known["after"], place.after)
        if place.valid is not None:
            least, most = known.get("valid_text", place.valid)
            known["valid_text"] = [min(least, place.valid[0]), max(most, place.valid[1])]
    tokens = [place.tokens for place in places]
    made = {
        "canvases": [canvases[key] for key in sorted(canvases)],
        "batch": [1, 1],
        "tokens": [min(tokens), max(tokens)] if tokens else [0, 0],
    }
    return replace(recipe, workload=made)


def with_origin(
    recipe: Recipe, model: Any, run: tuple[Sequence[float], float | None], judged_by: tuple[str, Target]
) -> Recipe:
    """The recipe with the model it was proven on and what it was judged by. run: noise levels and guidance scale."""
    name, target = judged_by
    objective = {"name": name, "version": 1, "limits": dict(target.limits)}
    return replace(recipe, host=host_record(model, *run), objective=objective)
