"""Swin as a trunk."""

from __future__ import annotations

from typing import Any

import torch

from glocal.models import create_model
from glocal.models.trunks.swin import Swin
from glocal.testing.backbone_tester import BackboneTester


class TestSwin(BackboneTester):
    def make(self, **keywords: Any) -> Swin:
        return Swin(16, (2, 2), (2, 4), window=3, img_size=32, **keywords)


def test_names_of_timm() -> None:
    with torch.device("meta"):
        model = create_model("swin_tiny")
    theirs = {
        "layers.1.downsample.reduction.weight": torch.zeros(1),
        "layers.0.blocks.0.attn.qkv.bias": torch.zeros(1),
        "head.fc.weight": torch.zeros(1),
    }
    found = type(model).convert(theirs)  # type: ignore[attr-defined]
    assert set(found) == {"layers.0.downsample.reduction.weight", "layers.0.blocks.0.attn.qkv.bias", "head.weight"}
    assert set(found) <= set(model.state_dict())
