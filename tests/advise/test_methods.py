"""Methods of a recipe: they build on any canvas, carry over between sizes, and name what they do not know."""

from __future__ import annotations

import pytest
import torch

from glocal.adapt.records import RunState, Site, SiteCall
from glocal.advise.methods import SYSTEMS, MethodSpec, candidates, default_tile, extent
from glocal.advise.rules import published_defaults
from glocal.canvas import Canvas, Layout

SHAPES = [(5, 7, 9), (3, 4, 5), (2, 11, 3)]


def specs(rank: int) -> list[MethodSpec]:
    """Every system, with extents of both kinds."""
    order, block = {"tile": [2] * rank}, (2**rank, 2**rank)
    half, few = [{"fraction": 0.5}] * rank, [{"tokens": 3}] * rank
    return [
        MethodSpec("dense", {}, "raster", (16, 16)),
        MethodSpec("gna", {"window": half}, order, block),
        MethodSpec("gna", {"window": few, "stride": [2] * rank}, "raster", (16, 16)),
        MethodSpec("tile_windows", {"tile": [2] * rank, "window": half, "first_frame": True}, order, block),
        MethodSpec("windows", {"size": few}, order, block),
        MethodSpec("radial", {"form": "tokens"}, order, block),
        MethodSpec("radial", {"form": "blocks", "decay": 0.5}, "raster", (16, 16)),
        MethodSpec("pooled_topk", {"keep": 0.4}, order, block, kind="route"),
        MethodSpec("skip_softmax", {"threshold": 0.2}, order, block, kind="route"),
        MethodSpec("rectified_spaattn", {"drop": 0.5}, "gilbert", (16, 16), kind="route", correction="rectified"),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_system_builds_and_runs_on_odd_canvases(shape: tuple[int, ...], generator: torch.Generator) -> None:
    layout = Layout.of(Canvas(shape))
    q, k, v = (torch.randn(1, 2, layout.nk, 8, generator=generator) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    used = set()
    for spec in specs(len(shape)):
        used.add(spec.system)
        out, plan, kernel = spec.run(q, k, v, SiteCall(Site("s", 0, 2, 8), layout, RunState()))
        assert out.shape == dense.shape and bool(out.isfinite().all()) and kernel
        assert 0 < plan.kept <= 1 and plan.visited >= plan.kept - 1e-6
        if spec.system == "dense":
            assert torch.allclose(out, dense, atol=1e-5)
    calibrated = {"paro"}  # has its own tests: it needs the model
    assert used == {name for name, system in SYSTEMS.items() if not system.causal} - calibrated


@pytest.mark.parametrize("tokens", [200, 129])
def test_causal_systems_see_no_later_token(tokens: int, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(3))
    call = SiteCall(Site("s", 0, 2, 8, causal=True), Layout.of(Canvas((tokens,))), RunState())
    used = set()
    for spec in [
        MethodSpec("causal_window", {"window": {"tokens": 40}, "sinks": 8}, block=(16, 16)),
        MethodSpec("causal_topk", {"keep": 0.4}, block=(16, 16), kind="route"),
    ]:
        used.add(spec.system)
        out, plan, _ = spec.run(q, k, v, call)
        assert 0 < plan.kept < 0.5
        later = v.clone()
        later[:, :, 100:] = torch.nan
        again = spec.run(q, k, later, call)[0]
        torch.testing.assert_close(again[:, :, :90], out[:, :, :90])
    assert used == {name for name, system in SYSTEMS.items() if system.causal}
    assert {m.system for m in candidates((tokens,), causal=True)} == used


def test_methods_of_causal_sites_go_nowhere_else(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 1, 64, 8, generator=generator) for _ in range(3))
    layout = Layout.of(Canvas((64,)))
    window = MethodSpec("causal_window", {"window": {"tokens": 16}})
    with pytest.raises(ValueError, match=r"causal_window\(.*\) is for causal sites, but 's' is not"):
        window.run(q, k, v, SiteCall(Site("s", 0, 1, 8), layout, RunState()))
    with pytest.raises(ValueError, match=r"windows\(.*\) is not causal, but 's' is causal"):
        causal = Site("s", 0, 1, 8, causal=True)
        MethodSpec("windows", {"size": [16]}).run(q, k, v, SiteCall(causal, layout, RunState()))


@pytest.mark.parametrize("shape", [(7, 9, 5), (9, 13), (37,)])
def test_candidates_build(shape: tuple[int, ...]) -> None:
    layout = Layout.of(Canvas(shape))
    q = torch.randn(1, 1, layout.nk, 4)
    found = candidates(shape)
    assert len({spec.id for spec in found}) == len(found)
    for spec in found:
        assert spec.plan(layout, q, q).kept > 0


def test_published_settings_build_on_a_small_canvas() -> None:
    layout = Layout.of(Canvas((8, 16, 16)))
    for plain in published_defaults((8, 16, 16), 6):
        assert 0 < plain.method.plan(layout).kept < 1


@pytest.mark.parametrize(
    ("value", "length", "more", "expected"),
    [
        ({"tokens": 4}, 16, {}, 4),
        (4, 16, {}, 4),
        ({"tokens": 40}, 16, {}, 16),
        ({"tokens": 0}, 16, {}, 1),
        ({"fraction": 0.5}, 16, {}, 8),
        ({"fraction": 0.5}, 16, {"odd": True}, 9),
        ({"fraction": 0.47}, 16, {"odd": True}, 7),
        ({"fraction": 1.0}, 16, {"odd": True}, 16),
        ({"fraction": 0.01}, 16, {}, 1),
        ({"fraction": 0.5}, 18, {"unit": 4}, 2),
        ({"fraction": 1.0}, 18, {"unit": 4}, 5),
        ({"tokens": 12}, 64, {"unit": 4, "odd": True}, 3),
    ],
)
def test_extents_round_to_the_axis(value: dict, length: int, more: dict, expected: int) -> None:
    assert extent(value, length, **more) == expected


def test_records_come_back_and_ids_follow_content() -> None:
    for spec in specs(3):
        assert MethodSpec.from_json(spec.to_json()) == spec
    one, two = MethodSpec("windows", {"size": [4]}), MethodSpec("windows", {"size": [5]})
    assert one.id != two.id and one.id.startswith("windows-")
    assert MethodSpec("gna", {"window": [{"fraction": 0.5}, {"tokens": 3}]}).words() == "gna(window=0.5x3t)"


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"system='windws' is unknown; legal: dense, gna, .*; nearest: windows"):
        MethodSpec("windws")
    with pytest.raises(ValueError, match=r"parameter 'dilation' of system 'gna' is unknown; legal: window, stride"):
        MethodSpec("gna", {"dilation": 2})
    with pytest.raises(ValueError, match=r"parameter 'x' of system 'dense' is unknown; legal: none"):
        MethodSpec("dense", {"x": 1})
    with pytest.raises(ValueError, match=r"field 'sistem' is unknown; legal: .*; nearest: system"):
        MethodSpec.from_json({"sistem": "gna"})


def test_routers_need_queries_and_patterns_are_no_routers() -> None:
    layout = Layout.of(Canvas((4, 4)))
    routed = MethodSpec("pooled_topk", {"keep": 0.5}, {"tile": [2, 2]}, (4, 4), kind="route")
    with pytest.raises(ValueError, match="is a router: its plan needs q and k"):
        routed.plan(layout)
    with pytest.raises(ValueError, match="is a pattern, not a router"):
        MethodSpec("dense").router(layout)


def test_tiles_fit_the_grid() -> None:
    for shape in ((1, 64, 64), (16, 16, 16), (3, 5), (4096,)):
        tile = default_tile(shape)
        assert all(t <= n for t, n in zip(tile, shape, strict=True))
        assert int(torch.tensor(tile).prod()) <= 64
