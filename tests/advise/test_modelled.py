"""Times of many candidates from some 30 timed calls: plans of known counts, the fit, its check, what it leads to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from glocal.adapt.records import RunState, Site, SiteCall
from glocal.advise import modelled, timing
from glocal.advise.dropped import Dropped
from glocal.advise.inside import ready_for
from glocal.advise.methods import MethodSpec
from glocal.advise.modelled import CALLS, MOST, grouped, times_of
from glocal.advise.timing import Ready, blocks_of, exact, uneven_blocks
from glocal.canvas import Canvas, Layout
from glocal.measure.timers import PairedTiming, summarize
from glocal.ops import attend
from glocal.plan.blockplan import BlockPlan
from glocal.plan.known_counts import CHECKED, FITTED, Counts, counted

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SHAPE, HEADS, TILE = (5, 6, 10), 2, [2, 2, 4]
SITE = Site("blocks.0.attn", 0, HEADS, 8)
CALL = SiteCall(SITE, Layout.of(Canvas(SHAPE)), RunState(step=0, timestep=1.0, rows=((0, "cond"),)))


@pytest.fixture
def qkv(generator: torch.Generator) -> Triple:
    q, k, v = (torch.randn(1, HEADS, 300, 8, generator=generator) for _ in range(3))
    return q, k, v


def many(count: int) -> list[MethodSpec]:
    """Windows of every extent, the last two of them rectified, and two routers."""
    sizes = [(a, b, c) for a in range(1, 6) for b in range(1, 7) for c in range(1, 11)][-count:]
    made = [MethodSpec("gna", {"window": list(size)}, {"tile": TILE}, (16, 16)) for size in sizes]
    whole = [{"fraction": f} for f in (0.5, 0.6, 0.7)]
    tiles = {"tile": TILE, "window": whole}
    made += [MethodSpec("tile_windows", tiles, {"tile": TILE}, (16, 16), correction=c) for c in ("none", "rectified")]
    return made + [MethodSpec("pooled_topk", {"keep": k}, {"tile": TILE}, (16, 16), kind="route") for k in (0.3, 0.6)]


def ready(methods: list[MethodSpec], qkv: Triple) -> dict[str, Ready]:
    q, k, v = qkv
    found = {m.id: ready_for(Dropped(), m.id, m, (q, k, v, CALL)) for m in methods}
    return {n: r for n, r in found.items() if r is not None}


def linear(plan: BlockPlan) -> float:
    """Seconds of a call on a machine that the model fits."""
    full, partial = blocks_of(plan, HEADS)
    return 1.0 + 0.01 * full + 0.02 * partial + 0.005 * uneven_blocks(plan, HEADS)


def bent(plan: BlockPlan) -> float:
    """And on one that it does not fit."""
    return 1.0 + 1e-6 * sum(blocks_of(plan, HEADS)) ** 2


def clock(methods: dict[str, Ready], seconds: Callable[[BlockPlan], float], seen: list[set[str]]) -> Any:
    """A comparison whose times follow the plans; routing takes 0.25 s, a correction 0.125 s."""

    def compare(contenders: dict[str, Any], **options: Any) -> PairedTiming:
        seen.append(set(contenders))
        times = {}
        for name, run in contenders.items():
            if name in methods:
                method = methods[name].method
                extra = 0.25 * (method.kind == "route") + 0.125 * (method.correction != "none")
                times[name] = seconds(methods[name].plan) + extra
            elif name.startswith("plan "):
                times[name] = seconds(run.args[3])
            else:
                times[name] = 0.25 if name.startswith("routing") else 0.125 if name.startswith("rectified") else 9.0
        return PairedTiming("dense: host", {n: summarize([t]) for n, t in times.items()}, {})

    return compare


def inner(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: SiteCall) -> torch.Tensor:
    return exact(q, k, v, call)[0]


@pytest.mark.parametrize("wanted", [*FITTED[::5], *CHECKED], ids=str)
def test_plans_have_the_counts_they_are_asked_for(wanted: Counts, qkv: Triple) -> None:
    """On a canvas that tiles do not fill: key blocks with pads are partial whatever is asked, and no pad is seen."""
    base = many(1)[0].plan(CALL.layout)
    assert bool((base.kv_order < 0).any())
    made = counted(base, wanted)
    rows = wanted.rows(base.q_blocks, base.kv_blocks)
    assert torch.equal((made.full.count + made.partial.count)[0].long(), rows)
    padded = (base.kv_order[0, 0].reshape(-1, 16) < 0).any(1)
    whole = int((~padded[made.partial.entries()[2]]).sum())
    assert whole == int(wanted.partial * (whole + int(made.full.count.sum())))
    assert not bool(padded[made.full.entries()[2]].any())
    q, k, v = qkv
    marked = v.clone()
    marked[:] = 1.0
    out = attend(q, k, marked, made, backend="reference").out
    torch.testing.assert_close(out, torch.ones_like(out))  # a pad that was seen would weigh in with something else
    torch.testing.assert_close(attend(q, k, v, made).out, attend(q, k, v, made, backend="reference").out)


def test_rows_are_as_uneven_as_asked() -> None:
    rows = Counts(0.5, 0.0, 0.6).rows(101, 1000)
    assert (int(rows[0]), int(rows[50]), int(rows[-1])) == (200, 500, 800)
    assert Counts(0.9, 0.0, 0.6).rows(3, 10).tolist() == [4, 9, 10] and Counts(0.01).rows(2, 10).tolist() == [1, 1]


def test_orders_of_heads_have_no_such_plans() -> None:
    base = many(1)[0].plan(CALL.layout)
    own = BlockPlan(**{**base.__dict__, "q_order": base.q_order.repeat(1, 2, 1)})
    with pytest.raises(ValueError, match="orders for heads or samples"):
        counted(own, FITTED[0])


def test_times_of_many_candidates_are_arithmetic(qkv: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ready(many(CALLS), qkv)
    assert len(methods) == CALLS + 4 and [len(g) for g in grouped(methods)] == [len(methods)]
    seen: list[set[str]] = []
    monkeypatch.setattr(timing, "compare_paired", clock(methods, linear, seen))
    found = times_of(*qkv, CALL, methods, rounds=1, inner=inner)
    assert len(seen) == 1 and len(seen[0]) <= 40
    assert found.trusted and set(found.methods) == set(methods)
    assert [c.forecast for c in found.checks] == pytest.approx([c.measured for c in found.checks], rel=1e-3)
    assert len(found.checks) == len(CHECKED)
    for name, time in found.methods.items():
        method = methods[name].method
        extra = 0.25 * (method.kind == "route") + 0.125 * (method.correction != "none")
        assert time.median == pytest.approx(linear(methods[name].plan) + extra, rel=1e-3)
        assert (time.rounds == 0) == (name not in seen[0])


def test_where_the_model_misses_some_candidates_are_timed(qkv: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ready(many(MOST + 6), qkv)
    seen: list[set[str]] = []
    monkeypatch.setattr(timing, "compare_paired", clock(methods, bent, seen))
    found = times_of(*qkv, CALL, methods, rounds=1, inner=inner)
    assert not found.trusted and found.model is not None and (found.model.check_error or 0) > 0.1
    assert len(found.methods) == MOST and all(t.rounds for t in found.methods.values())
    times = sorted(t.median for t in found.methods.values())
    every = sorted(bent(r.plan) for r in methods.values())
    assert times[0] <= every[1] and times[-1] >= every[-1]


def test_few_candidates_and_other_kernels_are_timed_one_by_one(qkv: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ready(many(4), qkv)
    seen: list[set[str]] = []
    monkeypatch.setattr(timing, "compare_paired", clock(methods, linear, seen))
    found = times_of(*qkv, CALL, methods, rounds=1, inner=inner)
    assert all(t.rounds for t in found.methods.values()) and not any(n.startswith("plan ") for n in seen[0])
    methods = ready(many(CALLS), qkv)
    monkeypatch.setattr(modelled, "attend", lambda *args, **more: _picked("another"))
    monkeypatch.setattr(timing, "compare_paired", clock(methods, linear, seen))
    found = times_of(*qkv, CALL, methods, rounds=1, inner=inner)
    assert found.model is None or all(t.rounds for t in found.methods.values())
    assert all(t.rounds for t in found.methods.values())


class _Picked:
    def __init__(self, name: str) -> None:
        self.picked, self.name = self, name


def _picked(name: str) -> _Picked:
    return _Picked(name)
