"""A winner that fails validation steps down the ladder, each time on samples no other attempt has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from glocal.advise import AdviseOptions, Effort, Frames, Target, Workload, advise, candidates, climb, inside, run
from glocal.advise.search import Rung
from glocal.advise.timing import MethodTime, Times
from glocal.advise.validation import Validation, verdict_over
from glocal.measure.stats import accept
from glocal.models.generation import VideoDiT

EFFORT = Effort("tiny", 2, 4, 1, (0.9, 0.8, 0.7), pairs=2, rounds=1, steps_a_bucket=1, published=0)
OPTIONS = AdviseOptions(candidates=tuple(candidates((4, 8, 8), tile_shape=(2, 4, 4))[:6]), min_tokens=64)
WIDE = Target(limits={"drift": 1e6})


def fixed_times(q, k, v, call, methods, *, rounds, inner=None):
    """A machine on which every method takes half the time of dense."""
    dense = MethodTime("dense", 1.0, 1.0, 1.0, 1, 0, 0, 1.0, 1.0, "cpu")
    return Times(dense, {n: replace(dense, method=n, median=0.5, kept=0.4, visited=0.4) for n in methods}, None)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[list[str]]]:
    """Measured rungs speed up in the order of their error; validation accepts attempt number n. Returns the samples."""

    def prepare(accepted: int) -> list[list[str]]:
        seen: list[list[str]] = []

        def validated(*args, **options) -> Validation:
            found = verdict_over(*args, **options)
            seen.append([p.sample for p in found.pairs])
            n = len(found.pairs)
            sparse = [1.0 if len(seen) == accepted else 9.0] * n
            return replace(found, verdict=accept([0.01 * i for i in range(n)], [2.0] * n, sparse, limit=1, target=1))

        def measured(*args) -> Rung:
            rung = measure_rung(*args)
            assert rung.error is not None
            return replace(rung, seconds=1 / (2 + rung.error), dense_seconds=1.0)

        measure_rung = climb.measure_rung
        monkeypatch.setattr(inside, "times_of", fixed_times)
        monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
        monkeypatch.setattr(run, "_refusal", lambda *args: None)
        monkeypatch.setattr(climb, "measure_rung", measured)
        monkeypatch.setattr(climb, "verdict_over", validated)
        return seen

    return prepare


def test_the_second_rung_is_proven_on_fresh_samples(
    tried: Callable[[int], list[list[str]]], model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    seen = tried(2)
    found = advise(model, workload, objective=objective, target=WIDE, effort=EFFORT, options=OPTIONS)
    assert len(seen) == 2 and not set(seen[0]) & set(seen[1])
    assert found.status == "candidate" and found.reason.endswith("1 faster recipe failed on other samples.")
    first, second = found.rejected[0].rung, found.chosen
    assert (
        second is not None and (second.speedup or 0) < (first.speedup or 0) and (second.error or 0) < (first.error or 0)
    )
    assert found.recipe.rules == second.recipe.rules
    assert list(found.recipe.evidence["splits"]) == ["probe", "weights", "validate", "validate_2"]
    assert "validation 2" in found.stages


def test_after_the_last_rung_the_answer_is_dense(
    tried: Callable[[int], list[list[str]]], model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    seen = tried(0)
    effort = replace(EFFORT, rungs=2)
    found = advise(model, workload, objective=objective, target=WIDE, effort=effort, options=OPTIONS)
    assert len(seen) == 2
    assert found.status == found.recipe.status == "dense" and not found.recipe.rules
    assert found.reason.startswith("Validation failed: lower 90% bound of the speed-up")
    assert found.chosen is not None and found.chosen.recipe.rules


def test_without_samples_left_there_is_one_attempt(
    tried: Callable[[int], list[list[str]]], model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    seen = tried(0)
    few = Workload(workload.samples[:5])
    found = advise(model, few, objective=objective, target=WIDE, effort=EFFORT, options=OPTIONS)
    assert len(seen) == 1 and found.status == "dense" and not found.rejected


def test_a_split_has_as_many_validations_as_the_samples_allow(workload: Workload) -> None:
    split = workload.split(probe=1, weights=1, validate=4, validations=3)
    parts = [split.probe, split.weights, *split.validations]
    assert [len(p) for p in parts] == [1, 1, 4, 4]
    assert len({s.id for p in parts for s in p.samples}) == 10
    assert workload.split(probe=1, weights=1, validate=4).further == ()
