"""Forecast replaced by measurement: which calls a recipe makes, and how each was forecast and timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glocal.adapt.records import Site
from glocal.advise import Frames, MethodSpec, Phase, Recipe, Rule, Workload, candidates, confirm
from glocal.advise.confirm import Confirmed, ConfirmedCall, deals, forecast_deal, refined
from glocal.advise.recipe import Fallback
from glocal.advise.timing import MethodTime, Times
from glocal.advise.weights import make_buckets
from glocal.measure.timers import PairedTiming, summarize
from glocal.models.generation import VideoDiT

FIRST, SECOND = candidates((4, 8, 8), tile_shape=(2, 4, 4))[:2]
METHODS: dict[str, MethodSpec] = {"a": FIRST, "b": SECOND}
LATE = Phase("sigma", 0.0, 0.5)
RECIPE = Recipe(
    "candidate",
    METHODS,
    (Rule("a", ((0, 0),)), Rule("a", ((1, 1),), (0,), phase=LATE), Rule("b", ((1, 1),), (1,), phase=LATE)),
    fallback=Fallback(min_tokens=64),
)
SITES = tuple(Site(f"blocks.{n}.attn", n, 2, 24) for n in range(2))
BUCKETS = make_buckets((1.0, 0.75, 0.5, 0.25, 0.0), 2)


def one(name: str, seconds: float) -> MethodTime:
    return MethodTime(name, seconds, seconds, seconds, 1, 0.0, 0.0, 0.5, 0.5, "cpu")


TIMES = Times(one("dense", 8.0), {"a": one("a", 4.0), "b": one("b", 2.0)}, None, split=0.5)


def test_each_way_to_deal_heads_is_counted_by_its_calls() -> None:
    assert [b.steps for b in BUCKETS] == [2, 2]
    found = deals(RECIPE, SITES, BUCKETS, 256)
    assert found == {(("a", (0, 1)),): 4, (("dense", (0, 1)),): 2, (("a", (0,)), ("b", (1,))): 2}
    assert forecast_deal((("a", (0,)), ("b", (1,))), TIMES) == pytest.approx(0.5 * 4 + 0.5 * 2 + 0.5)
    assert forecast_deal((("dense", (0, 1)),), TIMES) == 8.0


def test_rules_for_prefills_hold_at_the_tokens_of_the_call() -> None:
    rule = Rule("a", ((0, 1),), phase=Phase("prefill", 100, 1000))
    recipe = Recipe("candidate", {"a": METHODS["a"]}, (rule,))
    buckets = make_buckets((1.0, 0.0), 1, "prefill")
    assert deals(recipe, SITES, buckets, 256) == {(("a", (0, 1)),): 2}
    assert deals(recipe, SITES, buckets, 2000) == {(("dense", (0, 1)),): 2}


def test_calls_are_timed_inside_the_model(
    model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    true_run = MethodSpec.run
    names = {m.id: n for n, m in METHODS.items()}

    def run(self: MethodSpec, q: torch.Tensor, *args: Any) -> Any:
        ran.append(f"{names[self.id]}{q.shape[1]}")
        return true_run(self, q, *args)

    def clock(contenders: Any, *args: Any, **more: Any) -> PairedTiming:
        seconds = dict(zip(contenders, (10.0, 6.0, 5.0), strict=True))
        for call in contenders.values():
            call()
        return PairedTiming("dense", {n: summarize([t]) for n, t in seconds.items()}, {})

    monkeypatch.setattr(MethodSpec, "run", run)
    monkeypatch.setattr(confirm, "compare_paired", clock)
    known = RECIPE, deals(RECIPE, SITES, BUCKETS, 256), TIMES
    found = confirm.confirm(model, objective, workload.samples[0], "blocks.1.attn", known, 1)
    assert ran == ["a2", "a1", "b1"] * 2  # every way once before it is timed, and once timed
    assert [(c.calls, c.forecast, c.measured) for c in found.calls] == [(4, 5.0, 6.0), (2, 4.375, 5.0)]
    assert found.calls[1].words == f"1 head {METHODS['a'].words()}; 1 head {METHODS['b'].words()}"
    assert (found.dense, found.others, found.others_ratio) == (10.0, 2, 1.0)
    assert found.ratio() == pytest.approx((4 * 0.6 + 2 * 0.5 + 2) / 8)


def test_beyond_the_commonest_calls_the_forecast_stands(
    model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirm, "MOST", 1)
    known = RECIPE, deals(RECIPE, SITES, BUCKETS, 256), TIMES
    found = confirm.confirm(model, objective, workload.samples[0], "blocks.1.attn", known, 1)
    assert len(found.calls) == 1 and found.calls[0].measured > 0 and found.others == 4
    assert found.others_ratio == pytest.approx((8.0 + 3.5) / 2 / 8.0)


def test_a_run_is_the_sum_of_its_calls() -> None:
    found = Confirmed((ConfirmedCall("2 heads a", 3, 0.5, 0.75),), 1.0, 1, 1.0)
    assert found.ratio() == pytest.approx((3 * 0.75 + 1) / 4) and found.ratio("forecast") == pytest.approx(2.5 / 4)


def test_what_further_methods_cost_comes_from_the_calls_of_an_allocation() -> None:
    """Two methods in a call cost 0.5 s more than their shares by the time model, and 1, 2 and 3 s by these calls."""
    calls = [ConfirmedCall("", 1, 2.0, 2.0, 1)]
    calls += [ConfirmedCall("", 1, (4.0 + 0.5) / 2, (4.0 + cost) / 2, 2) for cost in (1.0, 3.0)]
    calls += [ConfirmedCall("", 1, (4.0 + 2 * 0.5) / 2, (4.0 + 2 * 2.0) / 2, 3)]
    found = refined(TIMES, Confirmed(tuple(calls), 4.0, 0, 1.0))  # dense took half as long beside them
    assert found.split == pytest.approx(2.0) and found.methods == TIMES.methods
    assert refined(TIMES, Confirmed(tuple(calls[:1]), 4.0, 0, 1.0)) is TIMES
