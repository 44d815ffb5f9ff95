"""Systems by name: what is published for a model, and methods from plain values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glocal.adapt import attach
from glocal.adapt.freeswim import FreeSwim
from glocal.adapt.hidiffusion import HiDiffusion
from glocal.adapt.paro import Paro
from glocal.adapt.paro_calibration import ParoSpec, calibrate
from glocal.adapt.published import kind, kinds, made, published
from glocal.adapt.radial import PRESETS as RADIAL
from glocal.adapt.sparse import SparseMethod
from glocal.adapt.teacache import TeaCache
from glocal.kernels.quant import Quant
from glocal.models.generation.video_dit import VideoDiT

from .test_pipelines import wan
from .test_sparse_methods import FLUX, HUNYUAN, WAN
from .test_sparse_methods import made as built


def test_what_is_published_for_a_model(generator: torch.Generator, model: VideoDiT) -> None:
    def names(thing: object) -> list[str]:
        return [f"{p.system} {p.preset}" for p in published(thing)]

    assert names(built(FLUX, generator)[0]) == ["gna flux-4k-90", "rectified_spaattn flux-4k", "teacache flux"]
    assert names(built(HUNYUAN, generator)[0]) == [
        "gna hunyuanvideo-58",
        "gna hunyuanvideo-91",
        "radial hunyuanvideo",
        "radial hunyuanvideo-long",
        "rectified_spaattn hunyuanvideo",
        "teacache hunyuanvideo",
    ]
    assert names(wan(boundary_ratio=0.8)) == [
        "radial wan2.2-a14b",
        "rectified_spaattn wan2.2-t2v",
        "rectified_spaattn wan2.2-i2v",
        "teacache wan2.2-t2v",
        "teacache wan2.2-i2v",
    ]
    assert published(model) == ()
    found = published(built(FLUX, generator)[0])[1]
    method = found.method(drop=0.5)
    assert isinstance(method, SparseMethod)
    assert method.settings.drop == 0.5 and method.settings.layers == found.settings.layers  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("system", "settings"),
    [
        ("radial", {"decay": 0.2, "block": 4}),
        ("rectified_spaattn", {"drop": 0.7, "mass": 0.0, "block": 4, "neighbours": False}),
        ("gna", {"window": [1, 2, 2], "stride": [1, 1, 2]}),
        ("tile_windows", {"tile": [1, 1, 2], "window": [1, 3, 1]}),
    ],
)
def test_methods_from_plain_values_in_the_built_in_model(
    system: str, settings: dict[str, object], model: VideoDiT, clip: Tensor
) -> None:
    method = made(system, settings)
    assert isinstance(method, SparseMethod)
    with torch.no_grad():
        plain = model(clip, torch.tensor([0.5]))
        with attach(model, method):
            assert not torch.equal(model(clip, torch.tensor([0.5])), plain)
        assert method.kept < 1
        assert torch.equal(model(clip, torch.tensor([0.5])), plain)


def test_refusals() -> None:
    systems = ("freeswim", "gna", "hidiffusion", "paro", "radial", "rectified_spaattn", "teacache", "tile_windows")
    assert kinds() == systems
    assert kind("tile_windows").presets == {}
    with pytest.raises(
        ValueError, match=r"system='radail' is no method of settings; legal: freeswim, .*; nearest: radial"
    ):
        made("radail", {})
    with pytest.raises(ValueError, match="radial: decai is unknown; legal: decay, .*; nearest: decay"):
        made("radial", {"decai": 1})
    for system, wrong, legal in (
        ("gna", {"window": 3}, "gna: window=3; legal: a list of whole numbers"),
        ("gna", {"window": "abc"}, "gna: window='abc'; legal: a list of whole numbers"),
        (
            "gna",
            {"window": (1, 3, 3), "stride": 0.5},
            "gna: stride=0.5; legal: a list of whole numbers or a whole number",
        ),
        ("radial", {"decay": "fast"}, "radial: decay='fast'; legal: a number"),
        ("teacache", {"polynomial": [1, "x"], "threshold": 0.1}, r"polynomial=\[1, 'x'\]; legal: a list of numbers"),
        ("rectified_spaattn", {"layers": [0.5]}, r"layers=\[0.5\]; legal: a list of whole numbers"),
        ("radial", {"sink": 1}, "radial: sink=1; legal: true or false"),
        ("rectified_spaattn", {"curve": "hilbert"}, "rectified_spaattn: curve='hilbert'; legal: gilbert, raster"),
    ):
        with pytest.raises(ValueError, match=legal):
            made(system, wrong)
    with pytest.raises(ValueError, match="tile_windows: window must be given; settings: tile, window"):
        made("tile_windows", {"tile": [2, 2]})
    with pytest.raises(ValueError, match="tile_windows: preset='wan' is unknown; legal: none is published"):
        made("tile_windows", {"preset": "wan"})
    with pytest.raises(ValueError, match=r"radial: preset='wan' is unknown; legal: wan2.1-14b, "):
        made("radial", {"preset": "wan"})
    with pytest.raises(ValueError, match=r"hidiffusion: preset must be given; .*; or a preset: sd, sdxl"):
        made("hidiffusion", {"raunet": False})
    with pytest.raises(ValueError, match="paro: plan must be given; settings: plan, quant, empty"):
        made("paro", {"quant": "int8"})


def test_a_preset_with_single_settings_changed() -> None:
    method = made("radial", {"preset": "wan2.1-14b", "dense_steps": 3})
    assert method.settings == replace(RADIAL["wan2.1-14b"].settings, dense_steps=3)  # type: ignore[attr-defined]
    hidi = made("hidiffusion", {"preset": "sdxl", "window_attention": False})
    assert isinstance(hidi, HiDiffusion) and not hidi.settings.window_attention and hidi.settings.raunet


def test_whole_forwards_are_skipped_by_plain_values(model: VideoDiT, clip: Tensor) -> None:
    method = made("teacache", {"polynomial": [0.5, 0], "threshold": 10, "signal": "time"})
    with torch.no_grad(), attach(model, method):
        for level in (0.9, 0.8, 0.7):
            model(clip, torch.tensor([level]))
    assert isinstance(method, TeaCache) and (method.computed, method.skipped) == (1, 2)


def test_systems_for_large_sizes_are_listed_apart(generator: torch.Generator) -> None:
    found = published(built(WAN, generator)[0], large=True)
    assert {p.system for p in found} == {"freeswim"} and len(found) == 4
    assert isinstance(found[0].method(cache_steps=3), FreeSwim)


def test_paro_from_a_file(model: VideoDiT, clip: Tensor, tmp_path: Path) -> None:
    spec = ParoSpec(density=0.3, block=4)
    plan = calibrate(model, lambda: model(clip, torch.tensor([0.5])), spec)
    plan.save(tmp_path / "plan.safetensors")
    outs = []
    for method in (made("paro", {"plan": str(tmp_path / "plan.safetensors")}), Paro(plan)):
        with torch.no_grad(), attach(model, method) as handle:
            handle.state.total = 1
            outs.append(model(clip, torch.tensor([0.5])))
        assert isinstance(method, SparseMethod) and method.kept < 1
    assert torch.equal(outs[0], outs[1])
    rounded = made("paro", {"plan": str(tmp_path / "plan.safetensors"), "quant": "int4", "empty": "drop"})
    assert isinstance(rounded, Paro) and rounded.quant == Quant("int4") and rounded.empty == "drop"
    with pytest.raises(FileNotFoundError, match="no such file"):
        made("paro", {"plan": str(tmp_path / "none.safetensors")})
