"""The main job on a tiny video model: every stage runs, outputs are whole, refusals say why."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glocal._progress import TextProgress
from glocal.advise import (
    AdviseOptions,
    Effort,
    Frames,
    MethodSpec,
    Recipe,
    Target,
    Workload,
    advise,
    attach,
    inside,
    run,
)
from glocal.advise.advice import Advice
from glocal.advise.calibrate import by_layer
from glocal.advise.confirm import Confirmed, ConfirmedCall
from glocal.advise.methods import candidates
from glocal.advise.recipe import Fallback
from glocal.advise.search import Found, base_rules, of_range
from glocal.advise.timing import Checked, MethodTime, Times, blocks_of
from glocal.advise.weights import even_weights, residual_under
from glocal.models.generation import SampleSpec, VideoDiT

EFFORT = Effort("tiny", 2, 4, 2, budgets=(0.8, 0.6), pairs=2, rounds=2, steps_a_bucket=1, published=1, wide=True)
OPTIONS = AdviseOptions(candidates=tuple(candidates((4, 8, 8), tile_shape=(2, 4, 4))), min_tokens=64)
OBJECTIVE = Frames(SampleSpec(steps=4), frames=4, height=32, width=32)


def times_by_pairs(q, k, v, call, methods, *, rounds, inner=None):
    """A machine on which time follows the pairs visited, whatever the real one does at this size."""

    def one(name: str, visited: float, kept: float, full: float) -> MethodTime:
        seconds = 1e-3 * (0.05 + 0.95 * visited)
        return MethodTime(name, seconds, seconds, seconds, rounds, full, 0.0, kept, visited, "cpu")

    plans = {name: ready.plan for name, ready in methods.items()}
    timed = {n: one(n, p.visited, p.kept, blocks_of(p, q.shape[1])[0]) for n, p in plans.items()}
    return Times(one("dense", 1.0, 1.0, 0.0), timed, None)


@pytest.fixture(scope="module")
def advice(model: VideoDiT) -> Advice:
    wide = Target(limits={"drift": 1e6})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "times_of", times_by_pairs)
        patch.setattr("glocal.advise.climb.refined", lambda times, found: times)
        patch.setattr(run, "_refusal", lambda *args: None)  # attention's share of so small a model is noise
        return advise(model, distinct(), objective=OBJECTIVE, target=wide, effort=EFFORT, options=OPTIONS)


def distinct() -> Workload:
    """Four samples whose arguments differ pairwise."""
    made = [{"shape": shape, **({"frames": 4} if extra else {})} for shape in ("disc", "square") for extra in (0, 1)]
    return Workload.from_calls(made, range(4))


def test_every_stage_leaves_its_records(advice: Advice) -> None:
    assert set(advice.stages) >= {"preflight", "time model", "probe", "step weights", "ladder"}
    assert {r.layer for r in advice.records} == {0, 1}
    assert advice.weights is not None and all(w > 0 for w in advice.weights.weight)
    assert {r.kind for r in advice.ladder} >= {"allocation"}
    assert all(r.error is not None and r.seconds for r in advice.ladder)
    assert {r.samples for r in advice.ladder} == {2}  # the probe sample and that of the step weights


def test_the_time_model_counts_its_methods(model: VideoDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    methods = {m.id: m for m in OPTIONS.candidates[:3]} | {"odd": MethodSpec("gna", {"window": [3, 3]})}
    said = io.StringIO()
    progress = TextProgress(said)
    progress.stage("time model", len(methods))
    timed = inside.times_inside(model, OBJECTIVE, distinct().samples[0], "blocks.0.attn", methods, 2, progress)
    progress.close()
    assert len(timed.times.methods) == 3 and "odd" in timed.dropped.why
    assert said.getvalue().startswith("time model (4) ...\ntime model: ") and " of 4" not in said.getvalue()


@pytest.mark.parametrize(
    ("names", "text"),
    [(("tile_windws",), "'tile_windws' is no candidate here; legal: .*tile_windows"), (("paro",), "'paro' alone")],
)
def test_methods_are_checked_before_any_work(names: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AdviseOptions(methods=names)
    assert AdviseOptions(methods=("causal_window", "tile_windows", "paro")).methods  # each somewhere


def test_a_limit_on_what_is_better_when_higher_is_refused_before_any_work(
    model: VideoDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "preflight", lambda *args: pytest.fail("the preflight ran"))
    with pytest.raises(ValueError, match="'psnr' is better when higher"):
        advise(model, distinct(), objective=OBJECTIVE, target=Target(limits={"psnr": 30.0}), effort=EFFORT)


def test_layers_have_gains_at_every_step_range_and_predictions_count_by_them(advice: Advice) -> None:
    assert set(advice.layers) == {("transformer", "self", layer, bucket) for layer in (0, 1) for bucket in (0, 1)}
    for bucket in (0, 1):
        mine = [advice.layers["transformer", "self", layer, bucket] for layer in (0, 1)]
        assert math.prod(mine) == pytest.approx(1) and mine[0] != pytest.approx(1, abs=1e-3)
    assert advice.weights is not None
    counted = by_layer(advice.records, advice.layers)
    probed, other = ([r for r in counted if r.sample == s] for s in dict.fromkeys(r.sample for r in counted))
    buckets, methods = advice.weights.buckets, {n: advice.methods[n] for n in {r.method for r in probed}}
    fallback = Fallback(min_tokens=OPTIONS.min_tokens)
    found = Found(probed, advice.times, even_weights(buckets), methods, base_rules(probed), fallback)
    alone = [(b, of_range(found, b, budget)) for b in buckets for budget in EFFORT.budgets]
    assert [r.bucket for r in advice.weights.runs] == [bucket.number for bucket, _ in alone]
    for made, (bucket, recipe) in zip(advice.weights.runs, alone, strict=True):
        assert made.residual == pytest.approx(residual_under(other, recipe, bucket))
        assert {r.phase for r in recipe.rules} == {bucket.phase}


def test_recipe_survives_save_load_and_another_step_count(advice: Advice, model: VideoDiT, tmp_path: Path) -> None:
    recipe = next(r.recipe for r in advice.ladder if r.kind == "allocation")
    recipe.save(tmp_path / "recipe.json")
    again = Recipe.load(tmp_path / "recipe.json")
    assert again.id == recipe.id and again.rules == recipe.rules
    longer = Frames(SampleSpec(steps=6), frames=4, height=32, width=32)
    sample = distinct().samples[0]
    with attach(model, tmp_path / "recipe.json") as handle:
        longer.run(model, sample)
        stats = handle.method.stats  # type: ignore[attr-defined]
    assert sum(s.sparse for s in stats.values()) > 0
    assert all(s.calls == 6 for s in stats.values())


def test_undo_is_bit_equal(advice: Advice, model: VideoDiT) -> None:
    sample = distinct().samples[1]
    before = OBJECTIVE.run(model, sample).tensor
    with attach(model, next(r.recipe for r in advice.ladder if r.kind == "allocation")):
        inside = OBJECTIVE.run(model, sample).tensor
    assert not torch.equal(before, inside)
    assert torch.equal(before, OBJECTIVE.run(model, sample).tensor)


def test_short_sequences_are_refused(model: VideoDiT) -> None:
    found = advise(model, distinct(), objective=OBJECTIVE, effort=EFFORT, options=replace(OPTIONS, min_tokens=1024))
    assert found.status == "dense" and "256 tokens" in found.reason and not found.recipe.rules
    assert found.recipe.check(model) == [] and found.recipe.host["components"][0]["name"] == "transformer"
    assert found.recipe.objective["limits"] == {"drift": 0.1}


def test_an_unreachable_target_is_refused_by_amdahl(model: VideoDiT) -> None:
    target = Target(speedup=1000.0)
    found = advise(model, distinct(), objective=OBJECTIVE, target=target, effort=EFFORT, options=OPTIONS)
    assert found.status == "dense" and "1000.00x" in found.reason


def test_page_and_evidence_hold_the_measured_rows(advice: Advice) -> None:
    from glocal.advise.ladder import rivals
    from glocal.cli._advice_page import advice_page
    from glocal.cli._advice_rows import rows
    from glocal.cli._advise_job import evidence
    from glocal.report import render_advice

    page = advice_page(advice, model="tiny", workload="4", created="now", reproduce="glocal", facts={"device": "cpu"})
    html = render_advice(page)
    assert "://" not in html.replace("http://www.w3.org", "")
    assert all(rung.name in html for rung in advice.ladder)
    kinds = {row["kind"] for row in rows(advice)}
    assert kinds >= {"probe", "time", "rung", "stage"}
    json.dumps(rows(advice))
    said = rivals(advice.ladder)
    assert said and all(words in html for words in said) and "allocation by relative error" in html
    assert evidence(advice)["allocations"] == list(said)
    one = next(r for r in advice.ladder if r.kind == "relative")
    with_one = replace(advice, chosen=one)
    assert [row["recipe"] for row in rows(with_one) if row.get("chosen")] == [one.recipe.id]
    assert evidence(with_one)["chosen"] == {"name": one.name, "kind": "relative"}
    timed = Confirmed((ConfirmedCall("2 heads of one method", 3, 0.5, 0.75),), 1.0, 1, 1.0)
    times = replace(advice.times, checks=(Checked("a plan", 0.5, 0.6),))
    confirmed = replace(advice, confirmed=timed, times=times)
    assert {"confirmed call", "time model check"} <= {row["kind"] for row in rows(confirmed)}
    assert evidence(confirmed)["attention_time"] == {"forecast": 0.625, "measured": 0.8125}
    page = advice_page(confirmed, model="tiny", workload="4", created="now", reproduce="glocal", facts={})
    html = render_advice(page)
    assert "forecast 62% of dense, timed 81%" in html and "2 heads of one method: forecast 0.5" in html
