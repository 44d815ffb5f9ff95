"""The partial-sum probe against direct masked attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glocal.adapt.records import RunState, Site, SiteCall
from glocal.advise import AdviceError, Frames, Workload
from glocal.advise import probe as probe_module
from glocal.advise.methods import MethodSpec, candidates, default_tile
from glocal.advise.partial import (
    Keys,
    Lists,
    PartialSums,
    Rows,
    blocks_of,
    candidates_at,
    gather_keys,
    partial_sums,
    picks_at,
    rows_of,
)
from glocal.advise.probe import LEAST_BLOCKS, Probe, ProbeSpec, measure, spread
from glocal.advise.router_rows import Blocks
from glocal.advise.tasks import Looks, measure_anchors, probe_sample
from glocal.advise.weights import make_buckets
from glocal.canvas import Canvas, Layout, Part
from glocal.models.generation import VideoDiT
from glocal.ops import Score, attend
from glocal.plan.blockplan import BlockPlan

SHAPE = (4, 6, 10)


def call_of(shape: tuple[int, ...], heads: int, residual: torch.Tensor | None = None, contribution=None) -> SiteCall:
    state = RunState(step=0, timestep=1.0, rows=((0, "cond"),))
    site = Site("blocks.0.attn", 0, heads, 8)
    return SiteCall(site, Layout.of(Canvas(shape)), state, residual, contribution)


def tensors(generator: torch.Generator, heads: int, tokens: int) -> list[torch.Tensor]:
    return [torch.randn(1, heads, tokens, 8, generator=generator) for _ in range(3)]


def probed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, block: int, call: SiteCall | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [H, R, D], mass [H, R] and places [R] of the rows of one query block, from partial sums."""
    here = call_of(SHAPE, q.shape[1]) if call is None else call
    every = q.shape[1]
    segments = here.layout.segments(1, "cpu")
    keys = gather_keys(k, v, Blocks.of(plan), here, segments, (0, every, every))
    at = blocks_of(Blocks.of(plan), [block], here, segments)[0]
    rows = rows_of(q, at, here, (0, every))
    lists = [Lists(plan, [block], every)]
    picks = picks_at(lists, 0, every)
    out, mass, _ = candidates_at(partial_sums(rows, keys), lists, (0, at), keys, (0, every), picks)
    return out[0], mass[0], rows.places


@pytest.mark.parametrize("number", range(len(candidates(SHAPE, tile_shape=(2, 2, 4)))))
def test_probe_equals_direct_attention(number: int, generator: torch.Generator) -> None:
    method = candidates(SHAPE, tile_shape=(2, 2, 4))[number]
    q, k, v = tensors(generator, 2, 240)
    call = call_of(SHAPE, 2)
    plan = method.plan(call.layout, q, k)
    direct = attend(q, k, v, plan, backend="reference").out[0]
    for block in spread(plan.q_blocks, 5):
        out, mass, rows = probed(q, k, v, plan, block)
        torch.testing.assert_close(out, direct[:, rows], rtol=0, atol=1e-5)
        assert bool(((mass > 0) & (mass <= 1 + 1e-5)).all())


@pytest.mark.parametrize("at_once", [256, 2])
def test_partial_blocks_are_recomputed(
    at_once: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glocal.advise.partial.AT_ONCE", at_once)
    method = MethodSpec("gna", {"window": [3, 3, 3]}, {"tile": [2, 2, 4]}, (16, 16))
    q, k, v = tensors(generator, 2, 240)
    plan = method.plan(call_of(SHAPE, 2).layout, q, k)
    assert int(plan.partial.count.sum()) > 0
    direct = attend(q, k, v, plan, backend="reference").out[0]
    out, _, rows = probed(q, k, v, plan, 3)
    torch.testing.assert_close(out, direct[:, rows], rtol=0, atol=1e-5)


def test_all_blocks_are_dense_attention(generator: torch.Generator) -> None:
    q, k, v = tensors(generator, 2, 240)
    method = MethodSpec("dense", {}, {"tile": [2, 2, 4]}, (16, 16))
    plan = method.plan(call_of(SHAPE, 2).layout, q, k)
    out, mass, rows = probed(q, k, v, plan, 0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)[0, :, rows]
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_records_hold_what_a_head_adds_to_the_stream(generator: torch.Generator) -> None:
    q, k, v = tensors(generator, 2, 240)
    weight = torch.randn(2, 8, 5, generator=generator)
    stream = torch.randn(1, 240, 5, generator=generator)
    call = call_of(SHAPE, 2, stream, lambda out: torch.einsum("bhmd,hdc->bhmc", out, weight))
    method = candidates(SHAPE, tile_shape=(2, 2, 4))[0]
    plan = method.plan(call.layout, q, k)
    spec = ProbeSpec({"m": method}, lambda step: 0, frozenset({0}), blocks=plan.q_blocks)
    records = {r.head: r for r in measure(q, k, v, call, {"m": plan}, spec)}
    assert set(records) == {-1, 0, 1}
    error = attend(q, k, v, plan, backend="reference").out - attend(q, k, v, backend="reference").out
    added = torch.einsum("bhmd,hdc->bhmc", error, weight)[0]
    for head, delta in ((0, added[0]), (1, added[1]), (-1, added.sum(0))):
        wanted = (delta.norm(dim=-1) / stream[0].norm(dim=-1)).square().mean().sqrt()
        assert records[head].residual == pytest.approx(float(wanted), rel=1e-4)
    assert records[0].kept == pytest.approx(plan.kept)


def test_methods_of_different_orders_are_probed_apart(generator: torch.Generator) -> None:
    """Two one-to-one orders of equal blocks: what one method loses must not depend on the other being there."""
    shape = (4, 4, 8)  # whole tiles: both orders have 128 places
    q, k, v = tensors(generator, 2, 128)
    tiled = MethodSpec("tile_windows", {"tile": [2, 2, 4], "window": [1, 1, 1]}, {"tile": [2, 2, 4]}, (16, 16))
    raster = MethodSpec("windows", {"size": [1, 4, 8]}, "raster", (16, 16))

    def found(**methods: MethodSpec) -> dict[tuple[str, int], float]:
        spec = ProbeSpec(methods, lambda step: 0, frozenset({0}), blocks=8)
        probe = Probe(spec)
        probe.core(q, k, v, call_of(shape, 2), lambda q, k, v, call: q)
        return {(r.method, r.head): r.output for r in probe.records}

    assert found(tiled=tiled, raster=raster) == {**found(tiled=tiled), **found(raster=raster)}


def test_blocks_are_spread_over_the_canvas() -> None:
    assert spread(64, 5) == [0, 16, 32, 47, 63]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(9, 1) == [4]


@pytest.mark.parametrize(
    ("shape", "tile"), [((16, 16, 16), (4, 4, 4)), ((64, 64), (8, 8)), ((2, 3), (2, 2)), ((4096,), (64,))]
)
def test_default_tile(shape: tuple[int, ...], tile: tuple[int, ...]) -> None:
    assert default_tile(shape) == tile


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, method: MethodSpec, call: SiteCall) -> torch.Tensor:
    score = Score(scale=call.site.scale, softcap=call.site.softcap)
    plan = method.plan(call.layout, q, k)
    return attend(q, k, v, plan, canvas=call.layout, score=score, backend="reference").out[0]


@pytest.mark.parametrize("kind", ["window", "topk"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_causal_sites_with_grouped_heads_and_a_soft_cap(
    kind: str, softcap: float | None, generator: torch.Generator
) -> None:
    q = torch.randn(1, 4, 200, 8, generator=generator)
    k, v = (torch.randn(1, 2, 200, 8, generator=generator) for _ in range(2))
    site = Site("s", 0, 4, 8, kv_heads=2, causal=True, softcap=softcap)
    call = SiteCall(site, Layout.of(Canvas((200,))), RunState(step=0))
    method = MethodSpec("causal_window", {"window": {"tokens": 50}, "sinks": 4}, block=(16, 16))
    if kind == "topk":
        method = MethodSpec("causal_topk", {"keep": 0.3}, block=(16, 16), kind="route")
    plan = method.plan(call.layout, q, k)
    direct = exact(q, k, v, method, call)
    for block in (0, 5, 12):
        out, mass, rows = probed(q, k, v, plan, block, call)
        torch.testing.assert_close(out, direct[:, rows], rtol=0, atol=1e-5)
        assert bool((mass <= 1 + 1e-5).all())


def test_padding_is_neither_asked_nor_seen(generator: torch.Generator) -> None:
    """Joint attention whose text is padded: padded keys carry no mass, padded queries are no rows."""
    q, k, v = (torch.randn(1, 2, 72 + 8, 8, generator=generator) for _ in range(3))
    k[:, :, 75:] = 50.0  # would take all the mass
    canvas = Canvas([Part("video", (3, 4, 6)), Part("text", 8)])
    layout = Layout(canvas, canvas, lengths={"text": torch.tensor([3])})
    call = SiteCall(Site("s", 0, 2, 8, kind="joint"), layout, RunState(step=0))
    method = MethodSpec("tile_windows", {"tile": [1, 2, 3], "window": [1, 2, 3]}, {"tile": [1, 2, 3]}, (6, 6))
    plan = method.plan(layout, q, k)
    direct = exact(q, k, v, method, call)
    seen = set()
    for block in range(plan.q_blocks):
        found = blocks_of(Blocks.of(plan), [block], call, layout.segments(1, "cpu"))
        if found:
            out, _, rows = probed(q, k, v, plan, block, call)
            torch.testing.assert_close(out, direct[:, rows], rtol=0, atol=1e-5)
            seen |= set(rows.tolist())
    assert seen == set(range(75))


def test_orders_of_each_head_are_probed_each_by_its_own(generator: torch.Generator) -> None:
    q, k, v = tensors(generator, 2, 240)
    call = call_of(SHAPE, 2)
    method = candidates(SHAPE, tile_shape=(2, 2, 4))[0]
    plan = method.plan(call.layout, q, k)
    shift = torch.stack([plan.q_order[0, 0], plan.q_order[0, 0].roll(plan.q_block)])[None]
    keys = torch.stack([plan.kv_order[0, 0], plan.kv_order[0, 0].roll(plan.kv_block)])[None]
    own = replace(plan, q_order=shift, kv_order=keys)
    spec = ProbeSpec({"m": method}, lambda step: 0, frozenset({0}), blocks=own.q_blocks)
    found = {r.head: r for r in measure(q, k, v, call, {"m": own}, spec)}
    dense = attend(q, k, v, backend="reference").out
    wanted = (attend(q, k, v, own, backend="reference").out - dense).norm(dim=-1) / dense.norm(dim=-1)
    for head in (0, 1):
        assert found[head].output == pytest.approx(float(wanted[0, head].square().mean().sqrt()), rel=1e-4)
    assert found[0].output != pytest.approx(found[1].output, rel=1e-3)


def memory_for(heads: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on more heads at once, or more query blocks a call, are too much."""
    true_sums, true_spread = probe_module.partial_sums, probe_module.spread

    def sums(rows: Rows, keys: Keys) -> PartialSums:
        if rows.q.shape[0] > heads:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true_sums(rows, keys)

    def chosen(there: int, count: int) -> list[int]:
        if count > blocks:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true_spread(there, count)

    monkeypatch.setattr(probe_module, "partial_sums", sums)
    monkeypatch.setattr(probe_module, "spread", chosen)


@pytest.mark.parametrize(("heads", "blocks"), [(1, 16), (2, 16), (1, 8)])
def test_out_of_memory_halves_the_heads_and_then_the_rows(
    heads: int, blocks: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors(generator, 4, 240)
    method = candidates(SHAPE, tile_shape=(2, 2, 4))[0]
    spec = ProbeSpec({method.id: method}, lambda step: 0, frozenset({0}), blocks=16)

    def run() -> Probe:
        probe = Probe(spec)
        probe.core(q, k, v, call_of(SHAPE, 4), lambda q, k, v, call: q)
        return probe

    whole = {r.head: r.output for r in run().records}
    memory_for(heads, blocks, monkeypatch)
    less = run()
    assert less.share is not None
    assert (less.share.heads, less.share.blocks) == (heads, blocks)
    assert [s.site for s in less.share.shrunk] == ["blocks.0.attn"] * len(less.share.shrunk)
    if blocks == 16:
        assert {r.head: r.output for r in less.records} == pytest.approx(whole)


def test_out_of_memory_below_eight_blocks_is_an_error(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors(generator, 2, 240)
    method = candidates(SHAPE, tile_shape=(2, 2, 4))[0]
    memory_for(0, 16, monkeypatch)
    probe = Probe(ProbeSpec({method.id: method}, lambda step: 0, frozenset({0}), blocks=16))
    with pytest.raises(torch.OutOfMemoryError):
        probe.core(q, k, v, call_of(SHAPE, 2), lambda q, k, v, call: q)
    assert probe.share is not None and probe.share.blocks == LEAST_BLOCKS


def test_a_probe_that_touched_the_run_is_told_of(model: VideoDiT, workload: Workload, objective: Frames) -> None:
    sample = workload.samples[0]
    methods = {m.id: m for m in candidates((4, 8, 8), tile_shape=(2, 4, 4))[:2]}
    with torch.no_grad():
        probed = probe_sample(model, objective, sample, methods, Looks(make_buckets(objective.levels, 2), 1, 4))
        ends = measure_anchors(model, objective, sample, probed)
    assert probed.steps == (1, 3) and ends.floor < 1e-4 < ends.ceiling and ends.seconds > 0
    changed = replace(probed, output=replace(probed.output, tensor=probed.output.tensor * 1.001))
    with torch.no_grad(), pytest.raises(AdviceError, match="The probe changed the model's own output"):
        measure_anchors(model, objective, sample, changed)
