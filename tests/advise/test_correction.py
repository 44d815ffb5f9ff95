"""Compositions in a recipe: rectification beside any order is what the systems do, and the probe sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt.radial import Radial, RadialSettings
from glocal.adapt.records import RunState, Site, SiteCall
from glocal.adapt.rectified_spaattn import RectifiedSpaAttn, SpaSettings
from glocal.adapt.sparse import SparseMethod
from glocal.advise.methods import MethodSpec
from glocal.advise.probe import ProbeSpec, measure
from glocal.canvas import Canvas, Layout, Part
from glocal.ops import attend

SHARES = {"system": "rectified_spaattn", "params": {"drop": 0.7}, "block": (16, 16), "kind": "route"}


def tensors(generator: torch.Generator, tokens: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, heads, tokens, 8, generator=generator) for _ in range(3))
    return q, k, v


def call_of(canvas: Canvas, heads: int = 2) -> SiteCall:
    return SiteCall(Site("s", 0, heads, 8, kind="joint"), Layout.of(canvas), RunState())


def published(method: SparseMethod, qkv: tuple[Tensor, Tensor, Tensor], call: SiteCall) -> Tensor:
    method.backend = "reference"
    return method.core(*qkv, call, lambda q, k, v, call: q)


@pytest.mark.parametrize("canvas", [Canvas((4, 8, 8)), Canvas((4, 6, 7)), Canvas((2, 8, 8), after=20)])
@pytest.mark.parametrize("order", ["gilbert", "raster"])
@pytest.mark.parametrize("rectify", [True, False])
def test_best_shares_are_rectified_spaattn(
    canvas: Canvas, order: Any, rectify: bool, generator: torch.Generator
) -> None:
    qkv, call = tensors(generator, canvas.size), call_of(canvas)
    settings = SpaSettings(drop=0.7, mass=0.0, block=16, neighbours=False, rectify=rectify, curve=order)
    correction = "rectified" if rectify else "none"
    own = MethodSpec(**SHARES, order=order, correction=correction, backend=("reference",))  # type: ignore[arg-type]
    torch.testing.assert_close(
        own.run(*qkv, call)[0], published(RectifiedSpaAttn(settings), qkv, call), rtol=0, atol=2e-5
    )


def test_a_radial_mask_is_rectified_as_the_system_does(generator: torch.Generator) -> None:
    canvas = Canvas((6, 8, 8), after=12)
    qkv, call = tensors(generator, canvas.size), call_of(canvas)
    params = {"form": "blocks", "decay": 0.5}
    own = MethodSpec("radial", params, "raster", (16, 16), correction="rectified", backend=("reference",))
    settings = RadialSettings(decay=0.5, block=16, rectify=True)
    want = published(Radial(settings), qkv, call)
    found, plan, _ = own.run(*qkv, call)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
    plain = attend(*qkv, plan, canvas=call.layout, backend="reference").out
    assert not torch.allclose(found, plain, atol=1e-3) and plan.kept < 1


@pytest.mark.parametrize("order", [{"tile": [2, 4, 2]}, "gilbert", "wht"])
@pytest.mark.parametrize("system", ["rectified_spaattn", "radial", "tile_windows"])
def test_the_probe_measures_the_rectified_output(order: Any, system: str, generator: torch.Generator) -> None:
    canvas = Canvas((4, 8, 10))
    q, k, v = tensors(generator, canvas.size)
    params = {"rectified_spaattn": {"drop": 0.6}, "radial": {"form": "tokens"}}.get(
        system, {"tile": [2, 4, 2], "window": [{"fraction": 0.5}] * 3}
    )
    kind = "route" if system == "rectified_spaattn" else "pattern"
    spec = MethodSpec(system, params, order, (16, 16), kind=kind, correction="rectified")  # type: ignore[arg-type]
    call = call_of(canvas)
    plan = spec.plan(call.layout, q, k, None, call)
    records = measure(q, k, v, call, {"m": plan}, ProbeSpec({"m": spec}, lambda step: 0, frozenset({0}), plan.q_blocks))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    lost = (spec.run(q, k, v, call)[0] - dense).norm(dim=-1) / dense.norm(dim=-1)
    for record in records:
        if record.head >= 0:
            assert record.output == pytest.approx(float(lost[0, record.head].square().mean().sqrt()), rel=1e-3)
    assert {r.head for r in records} == {-1, 0, 1}


def test_what_cannot_be_rectified_is_said(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="correction='mean'; legal: none, rectified"):
        MethodSpec("gna", {"window": [3, 3]}, correction="mean")
    with pytest.raises(ValueError, match="legal: patterns and routers of sites that are not causal"):
        MethodSpec("causal_window", {"window": 16}, correction="rectified")
    q, k, v = tensors(generator, 64, 4)
    spec = MethodSpec("windows", {"size": [4, 4]}, "raster", (16, 16), correction="rectified")
    with pytest.raises(ValueError, match="4 query heads and 2 key heads"):
        spec.run(q, k[:, :2], v[:, :2], call_of(Canvas((8, 8)), 4))
    two = Canvas([Part("a", (4, 8)), Part("b", (4, 8))])
    with pytest.raises(ValueError, match="has 2 grids; legal: one, and text around it"):
        spec.rectified(q, k, v, spec.plan(Layout.of(Canvas((8, 8)))), call_of(two, 4))
    with pytest.raises(ValueError, match="drop=1.0; legal"):
        MethodSpec("rectified_spaattn", {"drop": 1.0}, "raster", (16, 16), kind="route").plan(
            Layout.of(Canvas((8, 8))), q, k
        )
