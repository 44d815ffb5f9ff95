from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models.checkpoints import infer_variant
from glocal.models.registry import create_model
from glocal.models.vision.hilo import BlockSpec, LITv2
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dim": 8, "depths": (1, 2, 1), "heads": (1, 2, 4)}


class TestLITv2(BackboneTester):
    def side(self, length: int, stride: int) -> int:
        return ceil(length / 4) >> int(log2(stride // 4))

    def make(self, **keywords: Any) -> LITv2:
        return LITv2(**SHAPE, spec=BlockSpec((0, 2, 1), alpha=0.5), **keywords)

    def bad(self):
        return [
            (lambda: LITv2(8, (1, 1), (1, 2)), "LITv2: windows=(0, 0, 2, 1) has 4 entries; it needs 2, one a stage"),
            (lambda: self.model()(torch.zeros(1, 3, 8, 8)), "a map of 1 x 1 has no 2 x 2 patch; give a larger image"),
        ]


class TestLargeWindows(TestLITv2):
    def make(self, **keywords: Any) -> LITv2:
        return LITv2(**SHAPE, spec=BlockSpec((0, 4, 4)), **keywords)


CASES = (
    "hilo_d24_h6_s2_a05_6x8",
    "hilo_d20_h5_s2_a09_4x6",
    "hilo_d16_h4_s1_a05_5x7",
    "hilo_d16_h4_s3_a00_6x9",
    "hilo_d16_h4_s3_a10_6x9",
    "hilo_padded_s2_5x7",
    "hilo_padded_s4_9x6",
    "dtm_6x8",
    "convffn_block_6x6",
    "model_tiny_64_dense_70x90",
    "full_litv2_s",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"hilo/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


def test_large_maps_have_no_attention() -> None:
    model = LITv2(**SHAPE, spec=BlockSpec((0, 2, 1)))
    assert [hasattr(model.get_submodule(f"layers.{i}.blocks.0"), "norm1") for i in range(3)] == [False, True, True]


def test_other_token_mixers_fit_in() -> None:
    model = LITv2(**SHAPE, num_classes=2, spec=BlockSpec((0, 2, 1), mixer="swin")).eval()
    assert model(torch.zeros(1, 3, 40, 40)).shape == (1, 2)


def test_the_share_of_heads_is_read_from_the_weights() -> None:
    with torch.device("meta"):
        state = create_model("litv2_s_alpha_02").state_dict()
    assert infer_variant(state, "alpha_0.2.pth") == "litv2_s_alpha_02"
