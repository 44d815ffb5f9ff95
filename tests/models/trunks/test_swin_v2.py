"""Swin V2 as a trunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from glocal.models import create_model
from glocal.models.registry import variant
from glocal.models.trunks.swin_v2 import SwinV2
from glocal.testing.backbone_tester import BackboneTester


class TestSwinV2(BackboneTester):
    def make(self, **keywords: Any) -> SwinV2:
        model = SwinV2(16, (2, 2), (2, 4), window=4, img_size=32, **keywords)
        for module in model.modules():  # blocks start as the identity, where nothing inside them learns
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
        return model

    def bad(self):
        return [(lambda: SwinV2(trained=(12, 12)), "SwinV2: trained=(12, 12) has 2 entries; it needs 4")]


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_large_window12to24_384"])
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == variant(name).params


def test_names_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = create_model("swinv2_tiny_window8_256")
    state = model.state_dict()
    shapes = {"layers.0.blocks.1.attn.logit_scale": (3, 1, 1), "layers.0.blocks.1.attn.cpb_mlp.0.bias": (512,),
              "layers.3.blocks.1.attn.cpb_mlp.2.weight": (24, 512), "layers.1.blocks.0.attn.v_bias": (192,),
              "layers.0.downsample.norm.weight": (192,), "layers.0.blocks.0.norm2.weight": (96,)}  # fmt: skip
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert not any(name.endswith(("qkv.bias", "cpb_mlp.2.bias", "index")) for name in state)
    blocks = SwinV2(16, (2,), (2,)).get_submodule("layers.0.blocks").children()
    assert all(torch.equal(block.get_parameter("norm1.weight"), torch.zeros(16)) for block in blocks)
    theirs = {"layers.1.downsample.reduction.weight": torch.zeros(1), "head.fc.weight": torch.zeros(1)}
    assert set(SwinV2.convert(theirs)) == {"layers.0.downsample.reduction.weight", "head.weight"}
