from __future__ import annotations

from typing import Any

import pytest
import torch

from glocal.models.vision.plain import PlainBackbone
from glocal.nn import list_mixers
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (1, 2), "head_dim": 4}


class TestPlain(BackboneTester):
    def make(self, **keywords: Any) -> PlainBackbone:
        return PlainBackbone("davit", **SHAPE, mixer_spec={"window": 4}, **keywords)

    def bad(self):
        return [
            (lambda: PlainBackbone(dims=(8, 18), depths=(1, 1), head_dim=4), "head_dim=4 must divide dims=(8, 18)"),
            (lambda: PlainBackbone("davti", **SHAPE), "unknown name 'davti'; closest: 'davit'"),
        ]


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_trains_in_it(name: str) -> None:
    model = PlainBackbone(name, dims=(16, 32), depths=(2, 2), head_dim=8, num_classes=3).train()
    model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(bool(g.isfinite().all()) for g in grads)
