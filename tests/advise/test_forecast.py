"""What a job costs is said before it is paid: arithmetic over the preflight, a budget that stops, words for times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glocal.adapt import Site
from glocal.advise import (
    AdviceError,
    AdviseOptions,
    Effort,
    Frames,
    Preflight,
    Workload,
    advise,
    candidates,
    forecast_advice,
    forecast_stages,
)
from glocal.advise.forecast import Cost, check_budget, duration, parse_duration, total_seconds
from glocal.models.generation import VideoDiT

EFFORT = Effort("tiny", buckets=2, blocks=4, plain=1, budgets=(0.7,), pairs=2, rounds=1, steps_a_bucket=1, published=1)
OPTIONS = AdviseOptions(candidates=tuple(candidates((4, 8, 8), tile_shape=(2, 4, 4))[:3]), min_tokens=64)


def known(forward: float = 2.0, memory: int | None = 1000) -> Preflight:
    sites = tuple(Site(f"blocks.{i}", i, heads=2, head_dim=16) for i in range(3))
    return Preflight(sites, (4, 8, 8), 256, forward * 0.6, forward, memory, 500)


def test_stages_are_arithmetic_over_the_preflight() -> None:
    cost = Cost((1.0, 0.75, 0.5, 0.25, 0.0), candidates=10, probe_call=0.5)
    stages = {s.name: s for s in forecast_stages(known(), EFFORT, cost)}
    names = ["preflight", "time model", "probe", "layers", "step weights", "ladder", "confirm time", "validation"]
    assert list(stages) == names
    # Layers, plain methods, step ranges, steps from the middle range to the end, seconds of a forward.
    assert stages["layers"].seconds == 3 * 1 * 2 * 3 * 2.0
    large = forecast_stages(known(), replace(EFFORT, reduced=1), cost)  # one step each where the canvas is reduced
    assert next(s for s in large if s.name == "layers").seconds == 3 * 1 * 2 * 2.0
    assert stages["validation"].seconds == 2 * 4 * 4 * 2.0  # pairs, runs of a pair, steps, seconds of a forward
    assert stages["ladder"].seconds == (3 + 4) * 4 * 2.0  # three dense runs for the anchors, four rungs
    assert stages["step weights"].seconds == (4 + 2) * 2.0  # to the end from steps 0 and 2
    assert stages["probe"].seconds == pytest.approx(2 * 8.0 + 2 * 3 * 2 * 0.5)
    assert stages["probe"].disk > 0 and all(s.memory is not None and s.memory >= 1000 for s in stages.values())


def test_a_slower_forward_and_more_pairs_cost_in_proportion() -> None:
    cost = Cost((1.0, 0.5, 0.0), 10, 0.0)
    one = forecast_stages(known(1.0), EFFORT, cost)
    two = forecast_stages(known(2.0), EFFORT, cost)
    assert total_seconds(two) == pytest.approx(2 * total_seconds(one))
    assert all(s.memory is None for s in forecast_stages(known(memory=None), EFFORT, cost))


def test_the_forecast_of_a_model_measures_one_probed_call(
    model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    stages = forecast_advice(model, workload, objective=objective, effort=EFFORT, options=OPTIONS)
    assert all(s.seconds > 0 for s in stages)
    assert stages[0].memory is None or stages[0].memory > 2**20


def test_a_budget_below_the_forecast_stops_with_the_numbers(
    model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    options = AdviseOptions(candidates=OPTIONS.candidates, min_tokens=64, budget=1e-6)
    with pytest.raises(AdviceError, match=r"forecast is .* s, the budget 0\.0 s; .* takes most of it"):
        advise(model, workload, objective=objective, effort=EFFORT, options=options)
    check_budget(forecast_stages(known(), EFFORT, Cost((1.0, 0.0), 1, 0.0)), 1e6)


def test_durations_are_read_and_written() -> None:
    assert [parse_duration(t, "--budget") for t in ("6h", "30m", "90s", "1.5h")] == [21600, 1800, 90, 5400]
    for wrong in ("6", "h", "", "-1h", "soon", "nanh"):
        with pytest.raises(ValueError, match="--budget .*; legal: a (number|time)"):
            parse_duration(wrong, "--budget")
    assert [duration(s) for s in (7200, 90, 5)] == ["2.0 h", "1.5 min", "5.0 s"]
