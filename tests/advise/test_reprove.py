"""A recipe proven again: unseen samples only, three verdicts, and a recipe and page of the same kinds as advise."""

from __future__ import annotations

import pytest

from glocal.advise import Frames, MethodSpec, Recipe, RecipeError, Rule, Sample, Target, Workload, validate
from glocal.advise.recipe import Fallback
from glocal.models.generation import VideoDiT

HALF = MethodSpec("tile_windows", {"tile": [2, 4, 4], "window": [{"fraction": 0.5}] * 3}, {"tile": [2, 4, 4]}, (32, 32))
RECIPE = Recipe("candidate", {"half": HALF}, (Rule("half", ((0, 1),)),), fallback=Fallback(min_tokens=64))
# No speed-up is sought at this size: what is judged is the order of the verdicts, not the machine.
WIDE = Target(limits={"drift": 1e6})


def test_seen_samples_are_left_out(model: VideoDiT, workload: Workload, objective: Frames) -> None:
    seen = Workload(workload.samples[:9]).records()
    given = RECIPE.with_evidence(splits={"probe": seen})
    advice = validate(model, given, workload, objective=objective, target=WIDE, pairs=2)
    assert advice.validation is not None
    assert [p.sample for p in advice.validation.pairs] == [s.id for s in workload.samples[9:11]]
    splits = advice.recipe.evidence["splits"]
    assert splits["probe"] == seen and splits["validate"]["n"] == 2
    assert advice.recipe.evidence["proven_again"] == given.id
    with pytest.raises(ValueError, match="pairs=4: needs .* of 12 in the workload 3 share neither"):
        validate(model, given, workload, objective=objective, pairs=4)


def test_a_sample_counts_as_seen_by_its_arguments_or_its_seed(workload: Workload) -> None:
    first, second = workload.samples[:2]
    other = Workload((Sample("a", 900, first.args), Sample("b", second.seed, {"x": 1}), Sample("c", 901, {"x": 2})))
    fresh = other.unseen({"validate": Workload((first, second)).records()})
    assert fresh is not None and [s.id for s in fresh.samples] == ["c"]
    assert other.unseen({}) == other


def test_a_rejected_recipe_comes_back_dense(model: VideoDiT, workload: Workload, objective: Frames) -> None:
    strict = Target(limits={"drift": 1e-9})
    advice = validate(model, RECIPE, workload, objective=objective, target=strict, pairs=2)
    assert advice.status == advice.recipe.status == "dense" and not advice.recipe.rules
    assert advice.reason.startswith("Validation failed: upper 90% bound of mean drift")
    assert advice.chosen is not None and advice.chosen.recipe.rules == RECIPE.rules


def test_status_follows_the_verdict_and_the_number_of_pairs(
    model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.advise import reprove
    from glocal.measure.stats import accept

    def without_times(*args, **options):
        found = validate_pairs(*args, **options)
        drifts, n = [p.drift for p in found.pairs], len(found.pairs)
        verdict = accept(drifts, [2.0] * n, [1.0] * n, limit=1e6, target=1.0)
        return replace(found, verdict=verdict)

    from dataclasses import replace

    from glocal.advise.validation import validate_pairs

    monkeypatch.setattr(reprove, "validate_pairs", without_times)
    few = validate(model, RECIPE, workload, objective=objective, target=WIDE, pairs=2)
    many = validate(model, RECIPE, workload, objective=objective, target=WIDE)
    assert (few.status, many.status) == ("candidate", "validated")
    assert many.validation is not None and len(many.validation.pairs) == 8
    assert many.recipe.rules == RECIPE.rules and many.recipe.workload["canvases"][0]["shape"] == [4, 8, 8]


def test_the_page_of_a_validation_is_whole(model: VideoDiT, workload: Workload, objective: Frames) -> None:
    from glocal.cli._advice_page import advice_page
    from glocal.cli._advice_rows import rows
    from glocal.report import render_advice

    advice = validate(model, RECIPE, workload, objective=objective, target=WIDE, pairs=2)
    page = advice_page(advice, model="tiny", workload="2", created="now", reproduce="glocal", facts={"device": "cpu"})
    assert page.curve is not None and len(page.strips) == 4
    assert "this recipe, unseen pairs" in render_advice(page)
    assert [row["kind"] for row in rows(advice)].count("pair") == 2


def test_a_recipe_without_rules_has_nothing_to_prove(model: VideoDiT, workload: Workload, objective: Frames) -> None:
    with pytest.raises(ValueError, match="status 'dense' and no sparse rule"):
        validate(model, Recipe("dense"), workload, objective=objective)
    assert issubclass(RecipeError, ValueError)
