"""Step weights fitted to a measured ladder: towards what was measured, and only as far as it tells."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glocal.advise import Effort, MethodSpec, Recipe, Target
from glocal.advise.ladder import (
    Anchors,
    bucket_errors,
    build_ladder,
    corrected,
    mean_anchors,
    mean_rung,
    nearest,
    refit,
    rivals,
    winners,
)
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Fallback
from glocal.advise.search import Found, Rung, allocated, base_rules, single
from glocal.advise.timing import MethodTime, Times
from glocal.advise.weights import StepWeight, Weights, make_buckets

LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)
BUCKETS = make_buckets(LEVELS, 2)
SPARSE, HALF = (MethodSpec("tile_windows", {"tile": [2, 2, 2], "window": [{"fraction": f}] * 3}) for f in (0.25, 0.5))


def found(weight: tuple[float, float] = (1.0, 1.0)) -> Found:
    """Two layers of two heads; errors grow with what is left out, in the stream at the second layer, of the output at
    the first.
    """
    records = [
        ProbeRecord(
            f"b{layer}",
            layer,
            head,
            b.number,
            b.first,
            "both",
            "s",
            m.id,
            mass=1.0,
            output=error * (2 - layer),
            residual=error * (1 + layer),
            high=0.1,
            kept=0.2,
            visited=0.2,
        )
        for layer in range(2)
        for head in range(2)
        for b in BUCKETS
        for m, error in ((SPARSE, 0.2), (HALF, 0.05))
    ]
    dense = MethodTime("dense", 1.0, 1.0, 1.0, 1, 0, 0, 1.0, 1.0, "cpu")
    methods = {m.id: m for m in (SPARSE, HALF)}
    times = {n: replace(dense, method=n, median=t) for n, t in zip(methods, (0.2, 0.5), strict=True)}
    runs = (StepWeight(0, HALF.id, 0.1, 0.1, 0.1),)
    weights = Weights(BUCKETS, weight, weight, (1.0, 1.0), runs, ())
    return Found(records, Times(dense, times, None), weights, methods, base_rules(records), Fallback())


def measured(known: Found, rung: Rung | None, true: Found) -> Rung:
    """A rung with the error that other step weights predict for it."""
    assert rung is not None
    error, seconds = sum(bucket_errors(true, rung.recipe)), 1.0 - (1 - (rung.attention_ratio or 1)) / 2
    return replace(rung, error=error, seconds=seconds, dense_seconds=1.0)


def test_weights_move_towards_the_measured_ladder() -> None:
    known, true = found(), found((3.0, 0.5))
    rungs = [allocated(known, b) for b in (0.8, 0.6, 0.4)] + [single(known, b) for b in (0.8, 0.6, 0.4)]
    ladder = [measured(known, r, true) for r in rungs]
    fitted = refit(known, ladder)
    assert 1.5 < fitted.weight[0] < 3.5 and 0.4 < fitted.weight[1] < 0.9
    stiff = refit(known, ladder, stiffness=1e6)
    assert stiff.weight == pytest.approx(known.weights.weight, rel=1e-3)


def test_the_best_budget_is_allocated_again_with_them() -> None:
    known, true = found(), found((6.0, 0.3))
    rungs = [allocated(known, b) for b in (0.8, 0.6)] + [single(known, b) for b in (0.8, 0.6)]
    ladder = [measured(known, r, true) for r in rungs]
    anchors = Anchors(1.0, 0.0, 10.0, {})
    again = corrected(known, ladder, anchors, Target(limits={"drift": 0.5}))
    assert again is not None and again.name.endswith("weights fitted to the ladder")
    assert measured(known, again, true).error <= min(r.error for r in ladder if r.budget == again.budget) + 1e-9  # type: ignore[operator, type-var]
    assert corrected(known, ladder[:1], anchors, Target()) is None


def test_every_recipe_stands_once_on_the_ladder() -> None:
    effort = Effort("e", budgets=(0.4, 0.4001), published=0)
    ladder = build_ladder(found(), effort, (4, 4, 4), LEVELS)
    assert len({r.recipe.id for r in ladder}) == len(ladder)
    assert {r.kind for r in ladder} == {"allocation", "relative", "single"}


@pytest.mark.parametrize(("truth", "kind"), [("residual", "allocation"), ("output", "relative")])
def test_of_two_allocations_the_one_that_is_measured_to_err_less_is_chosen(truth: str, kind: str) -> None:
    known = found()
    true = replace(known, records=[replace(r, residual=getattr(r, truth)) for r in known.records])
    ladder = build_ladder(known, Effort("e", budgets=(0.4,), published=0), (4, 4, 4), LEVELS)
    assert [r.kind for r in ladder] == ["allocation", "relative", "single"]
    assert len({r.name for r in ladder}) == 3 and "relative error" in ladder[1].name
    better, worse = sorted((measured(known, r, true) for r in ladder[:2]), key=lambda r: r.kind != kind)
    worse = replace(worse, seconds=0.98 * (worse.seconds or 0))  # as times of single runs spread
    anchors, wide = Anchors(1.0, 0.0, 10.0, {}), Target(limits={"drift": 0.5})
    assert [r.kind for r in winners([worse, better], anchors, wide)[0]] == [kind]
    (said,) = rivals([worse, better])
    by = "relative" if kind == "relative" else "residual"
    assert said.startswith(f"At 40% of the attention time the allocation by {by} error errs less: measured ")
    slow = replace(better, seconds=0.99)
    assert winners([worse, slow], anchors, replace(wide, speedup=1.1))[0] == [worse]


def test_the_relative_allocation_knows_no_step_weights_but_its_prediction_does() -> None:
    early, late = (allocated(found(w), 0.4, "output") for w in ((5.0, 0.2), (0.2, 1.0)))
    assert early is not None and late is not None and early.recipe.id == late.recipe.id
    assert early.predicted == pytest.approx(sum(bucket_errors(found((5.0, 0.2)), early.recipe)))
    assert early.predicted != pytest.approx(late.predicted)
    assert rivals([early, late]) == ()  # nothing is measured


def test_the_nearest_rung_is_the_least_wrong_of_the_faster_ones() -> None:
    def rung(name: str, seconds: float, error: float | None) -> Rung:
        return Rung(name, "single", Recipe("dense"), None, None, None, seconds, 1.0, error)

    rungs = [rung("slow", 1.2, 0.01), rung("rough", 0.5, 0.9), rung("fine", 0.8, 0.2), rung("failed", 0.5, None)]
    assert [r.name for r in nearest(rungs)] == ["fine"]
    assert [r.name for r in nearest([*rungs, rung("as fine and faster", 0.7, 0.21)])] == ["as fine and faster"]
    assert nearest([rung("slow", 1.2, 0.01)]) == []


def test_samples_are_averaged() -> None:
    one = Rung("a", "single", Recipe("dense"), None, None, None, 1.0, 2.0, 0.1, {"psnr": 20.0})
    each = [Anchors(1.0, 0.0, 1.0, {"psnr": 1.0}), Anchors(2.0, 0.2, 3.0, {"psnr": 3.0})]
    two = mean_rung([one, replace(one, seconds=3.0, dense_seconds=4.0, error=0.3, measures={"psnr": 30.0})], each)
    assert two.worst == pytest.approx(0.1)  # the other one's is (0.3 - 0.2) / (3 - 0.2)
    assert (two.seconds, two.dense_seconds, two.error, two.samples) == pytest.approx((2.0, 3.0, 0.2, 2))
    assert two.measures == {"psnr": 25.0} and two.speedup == pytest.approx(1.5)
    ends = mean_anchors(each)
    assert (ends.seconds, ends.floor, ends.ceiling) == pytest.approx((1.5, 0.1, 2.0)) and ends.measures == {"psnr": 2.0}


def test_a_recipe_that_fails_on_one_sample_is_no_winner() -> None:
    """Its mean is within the limit, but one sample drifts more than twice as far, which no validation would accept."""

    def rung(name: str, seconds: float, worst: float) -> Rung:
        return Rung(name, "single", Recipe("dense"), None, None, None, seconds, 1.0, 0.09, samples=2, worst=worst)

    anchors, fast, sound = Anchors(1.0, 0.0, 1.0, {}), rung("fast", 0.5, 0.21), rung("sound", 0.8, 0.19)
    assert [r.name for r in winners([fast, sound], anchors, Target())[0]] == ["sound"]
    none, why = winners([fast], anchors, Target())
    assert not none and "is 0.090, 0.210 on the worst sample (fast); the limit is 0.100" in why
