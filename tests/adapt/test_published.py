"""Systems by name: what is published for a model, and methods from plain values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.adapt import attach
from glocal.adapt.published import kind, kinds, made, published
from glocal.adapt.sparse import SparseMethod
from glocal.models.generation.video_dit import VideoDiT

from .test_pipelines import wan
from .test_sparse_methods import FLUX, HUNYUAN
from .test_sparse_methods import made as built


def test_what_is_published_for_a_model(generator: torch.Generator, model: VideoDiT) -> None:
    def names(thing: object) -> list[str]:
        return [f"{p.system} {p.preset}" for p in published(thing)]

    assert names(built(FLUX, generator)[0]) == ["gna flux-4k-90", "rectified_spaattn flux-4k"]
    assert names(built(HUNYUAN, generator)[0]) == [
        "gna hunyuanvideo-58",
        "gna hunyuanvideo-91",
        "radial hunyuanvideo",
        "radial hunyuanvideo-long",
        "rectified_spaattn hunyuanvideo",
    ]
    assert names(wan(boundary_ratio=0.8)) == [
        "radial wan2.2-a14b",
        "rectified_spaattn wan2.2-t2v",
        "rectified_spaattn wan2.2-i2v",
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
    assert kinds() == ("gna", "radial", "rectified_spaattn", "tile_windows")
    assert kind("tile_windows").presets == {}
    with pytest.raises(ValueError, match=r"system='radail' is no method of settings; legal: gna, .*; nearest: radial"):
        made("radail", {})
    with pytest.raises(ValueError, match="radial: decai is unknown; legal: decay, .*; nearest: decay"):
        made("radial", {"decai": 1})
    with pytest.raises(ValueError, match="tile_windows: window must be given; settings: tile, window"):
        made("tile_windows", {"tile": [2, 2]})
