"""Routers and rectification asked for some query blocks say of them what they say when asked for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt.records import RunState, Site, SiteCall
from glocal.advise.correction import groups_of, looked_at, rectified
from glocal.advise.methods import MethodSpec
from glocal.advise.partial import Lists
from glocal.advise.probe import Probe, ProbeSpec, measure, spread
from glocal.advise.router_rows import Blocks, RouterRows, router_blocks, shares_seen
from glocal.canvas import Canvas, Layout, Part

TILE = {"tile": [2, 2, 4]}
ROUTERS = [
    MethodSpec("pooled_topk", {"keep": 0.3}, TILE, (16, 16), kind="route"),
    MethodSpec("rectified_spaattn", {"drop": 0.6}, TILE, (16, 16), kind="route"),
    MethodSpec(
        "rectified_spaattn", {"drop": 0.8, "mass": 0.5}, "gilbert", (16, 16), kind="route", correction="rectified"
    ),
]
CANVASES = [Canvas((4, 4, 8)), Canvas((5, 6, 10)), Canvas((4, 4, 8), after=20)]


def call_of(canvas: Canvas, heads: int, **layout: Any) -> SiteCall:
    laid = Layout(canvas, canvas, **layout) if layout else Layout.of(canvas)
    return SiteCall(Site("s", 0, heads, 8, kind="joint"), laid, RunState(step=0))


def tensors(generator: torch.Generator, tokens: int, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, heads, tokens, 8, generator=generator) for _ in range(3))
    return q, k, v


def same_lists(some: Lists, whole: Lists, heads: int, count: int) -> None:
    for at in range(count):
        assert torch.equal(some.full(at, (0, heads)), whole.full(at, (0, heads)))
        for head in range(heads):
            mine, theirs = int(some.of_head[head]), int(whole.of_head[head])
            n = some.counts[mine][at]
            assert n == whole.counts[theirs][at]
            assert torch.equal(some.index[mine, at, :n], whole.index[theirs, at, :n])


@pytest.mark.parametrize("canvas", CANVASES, ids=["whole tiles", "pads", "words"])
@pytest.mark.parametrize("method", ROUTERS, ids=lambda m: m.words())
def test_lists_are_those_of_the_whole_plan(method: MethodSpec, canvas: Canvas, generator: torch.Generator) -> None:
    qkv, call = tensors(generator, canvas.size), call_of(canvas, 3)
    whole = method.plan(call.layout, *qkv[:2], None, call)
    blocks = router_blocks(method, call, qkv[0].device)
    assert blocks is not None and blocks.same(Blocks.of(whole))
    chosen = spread(whole.q_blocks, 5)
    rows = RouterRows(qkv, call, torch.tensor(chosen))
    some = rows.plan(method)
    assert some.q_blocks == 5
    same_lists(Lists(some, range(5), 3), Lists(whole, chosen, 3), 3, 5)
    every = RouterRows(qkv, call, torch.arange(whole.q_blocks)).plan(method)
    assert shares_seen(every) == pytest.approx((whole.kept, whole.visited * call.layout.nq / canvas.size))
    if method.correction != "none":
        groups = groups_of(canvas, method.orders(canvas), "cpu")
        want = rectified(looked_at(*qkv[:2], call.layout, groups, None), qkv[2], whole, groups)
        found = rows.rectified(method, some, whole=False)
        assert found is not None
        out = torch.randn(3, 16, 8, generator=generator)
        for place, number in enumerate(chosen):
            torch.testing.assert_close(found.at(place, (0, 3), out), want.at(number, (0, 3), out))


def test_padded_words_are_no_part_of_what_a_router_sees(generator: torch.Generator) -> None:
    canvas = Canvas([Part("video", (4, 4, 8)), Part("text", 20)])
    call = call_of(canvas, 3, lengths={"text": torch.tensor([7, 12])})
    qkv = tensors(generator, canvas.size)
    for method in ROUTERS:
        whole = method.plan(call.layout, *qkv[:2], None, call)
        some = RouterRows(qkv, call, torch.arange(whole.q_blocks)).plan(method)
        same_lists(Lists(some, range(whole.q_blocks), 3), Lists(whole, range(whole.q_blocks), 3), 3, whole.q_blocks)


def test_causal_routers_keep_their_own_block(generator: torch.Generator) -> None:
    q = torch.randn(1, 4, 200, 8, generator=generator)
    k = torch.randn(1, 2, 200, 8, generator=generator)
    call = SiteCall(Site("s", 0, 4, 8, kv_heads=2, causal=True), Layout.of(Canvas((200,))), RunState(step=0))
    method = MethodSpec("causal_topk", {"keep": 0.3}, block=(16, 16), kind="route")
    whole, chosen = method.plan(call.layout, q, k, None, call), [0, 5, 12]
    some = RouterRows((q, k, k), call, torch.tensor(chosen)).plan(method)
    same_lists(Lists(some, range(3), 4), Lists(whole, chosen, 4), 4, 3)


def test_routers_that_cannot_be_cut_and_patterns_are_asked_for_all() -> None:
    call = call_of(Canvas((4, 4, 8)), 3)
    skip = MethodSpec("skip_softmax", {"threshold": 0.1}, TILE, (16, 16), kind="route")
    window = MethodSpec("tile_windows", {**TILE, "window": [1, 1, 1]}, TILE, (16, 16))
    assert router_blocks(skip, call, torch.device("cpu")) is None
    assert router_blocks(window, call, torch.device("cpu")) is None


@pytest.mark.parametrize("canvas", CANVASES, ids=["whole tiles", "pads", "words"])
def test_the_probe_finds_what_whole_plans_give(canvas: Canvas, generator: torch.Generator) -> None:
    q, k, v = tensors(generator, canvas.size)
    call = call_of(canvas, 3)
    windows = MethodSpec("tile_windows", {**TILE, "window": [1, 2, 2]}, TILE, (16, 16), correction="rectified")
    methods = {m.id: m for m in (windows, *ROUTERS[:2])}
    spec = ProbeSpec(methods, lambda step: 0, frozenset({0}), blocks=4)
    probe = Probe(spec)
    probe.core(q, k, v, call, lambda q, k, v, call: q)
    plans = {n: m.plan(call.layout, q, k, None, call) for n, m in methods.items()}
    want = {(r.method, r.head): (r.mass, r.output, r.residual) for r in measure(q, k, v, call, plans, spec)}
    found = {(r.method, r.head): (r.mass, r.output, r.residual) for r in probe.records}
    assert set(found) == set(want) and len(found) == 3 * 4
    for key, values in want.items():
        assert found[key] == pytest.approx(values, rel=1e-4, abs=1e-6)
