"""CSWin as a trunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glocal.models import create_model
from glocal.models.trunks.cswin import CSWin
from glocal.testing.backbone_tester import BackboneTester


class TestCSWin(BackboneTester):
    def make(self, **keywords: Any) -> CSWin:
        return CSWin(8, (1, 2, 1), (2, 4, 4), (1, 2, None), **keywords)

    def bad(self):
        return [(lambda: CSWin(splits=(1, 2)), "CSWin: splits=(1, 2) has 2 entries; it needs 4")]


@pytest.mark.parametrize(("name", "millions"), [("cswin_tiny", 22), ("cswin_small", 35), ("cswin_large", 173)])
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_names_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = create_model("cswin_tiny").state_dict()
    shapes = {"stage1_conv_embed.0.weight": (64, 3, 7, 7), "stage1_conv_embed.2.weight": (64,),
              "stage1.0.attns.1.get_v.weight": (32, 1, 3, 3), "stage4.0.attns.0.get_v.weight": (512, 1, 3, 3),
              "merge3.conv.weight": (512, 256, 3, 3), "stage3.20.qkv.bias": (768,)}  # fmt: skip
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
