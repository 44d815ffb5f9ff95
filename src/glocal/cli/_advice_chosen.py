"""The recipe that a page speaks of, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glocal.advise.advice import Advice
    from glocal.advise.recipe import Recipe
    from glocal.advise.search import Rung
    from glocal.advise.weights import Bucket
    from glocal.canvas import Layout


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def chosen_rules(advice: Advice) -> Recipe | None:
    """The recipe that was validated, also where it was rejected."""
    if advice.recipe.rules:
        return advice.recipe
    return None if advice.chosen is None else advice.chosen.recipe


def is_chosen(advice: Advice, rung: Rung) -> bool:
    """Whether this rung of the ladder is the one that went to validation."""
    return advice.chosen is not None and (rung.name, rung.budget) == (advice.chosen.name, advice.chosen.budget)


def range_words(bucket: Bucket) -> str:
    return f"{bucket.high:.2f}–{bucket.low:.2f}" if bucket.coordinate == "sigma" else "whole run"


def kept_share(advice: Advice, recipe: Recipe, name: str) -> float:
    """Share of pairs a method keeps on this canvas; published settings were not timed one by one."""
    if name in advice.times.methods:
        return advice.times.methods[name].kept
    return recipe.methods[name].plan(layout(advice)).kept


def layout(advice: Advice) -> Layout:
    """The canvas of the probe sample, with its other tokens."""
    from glocal.canvas import Canvas, Layout

    place = advice.preflight.place
    before, after = (0, 0) if place is None else (place.before, place.after)
    return Layout.of(Canvas(advice.preflight.shape, before=before, after=after))
