"""The partial-sum probe against direct masked attention."""

from __future__ import annotations

import pytest
import torch

from glocal.adapt.records import RunState, Site, SiteCall
from glocal.advise.methods import MethodSpec, candidates, default_tile
from glocal.advise.partial import Lists, candidates_at, gather_keys, partial_sums, rows_of
from glocal.advise.probe import Probe, ProbeSpec, measure, spread
from glocal.canvas import Canvas, Layout
from glocal.ops import attend
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
    keys = gather_keys(k, v, plan, here, (0, every, every))
    rows = rows_of(q, plan, block, here, (0, every))
    out, mass = candidates_at(partial_sums(rows, keys), [Lists(plan, (0, every, every))], block, rows, keys)
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


def test_partial_blocks_are_recomputed(generator: torch.Generator) -> None:
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
