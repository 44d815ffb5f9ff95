from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models.checkpoints import fill
from glocal.models.vision.stvit import BlockSpec, STViT
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (1, 1), "heads": (1, 2), "cells": (4, 1), "iterations": (2, 1)}


class TestSTViT(BackboneTester):
    def make(self, **keywords: Any) -> STViT:
        spec = BlockSpec(mlp_ratio=2.0, layer_scale=0.5)
        return STViT(**SHAPE, spec=spec, layer_scales=(False, True), projection=24, **keywords)

    def bad(self):
        return [(lambda: STViT((8, 16), (1, 1), (1, 2), (4,)), "STViT: cells=(4,) has 1 entries; it needs 2")]


CASES = (
    "full_stvit_small",
    "layer_s4_8x12",
    "model_tiny_64x64",
    "model_tiny_75x106",
    "sta_d12_s2x2_it2_10x8",
    "sta_d12_s4x4_it1_13x18",
    "sta_d16_s1x1_it1_6x5",
    "sta_d16_s4x4_it1_16x24",
    "sta_d8_s8x8_it3_24x24",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"stvit/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


def test_a_features_model_takes_the_trunk_of_a_classifier() -> None:
    small: Any = {**SHAPE, "layer_scales": (False, False), "projection": 24}
    state = STViT(**small, num_classes=3).state_dict()
    fixed = {f"layers.0.blocks.0.attn.{name}.weights": torch.zeros(9, 1, 3, 3) for name in ("fold", "unfold")}
    model = STViT(**small, features_only=True)
    fill(model, state | fixed)
    assert torch.equal(model.state_dict()["patch_embed.proj.0.weight"], state["patch_embed.proj.0.weight"])
