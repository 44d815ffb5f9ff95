from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models.vision.sg_former import BlockSpec, SGFormer
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (2, 1), "heads": (2, 2), "reductions": (2, 1), "size": 64}


class TestSGFormer(BackboneTester):
    def make(self, **keywords: Any) -> SGFormer:
        return SGFormer(**SHAPE, **keywords)

    def bad(self):
        return [
            (lambda: SGFormer(depths=(2, 3, 2, 1)), "must be even where a reduction is above 1"),
            (lambda: SGFormer(heads=(2, 2)), "heads=(2, 2) has 2 entries; it needs 4, one a stage"),
        ]


def test_another_mixer() -> None:
    model = SGFormer(**SHAPE, spec=BlockSpec(mixer="davit"), num_classes=3)
    assert model(torch.zeros(1, 3, 40, 40)).shape == (1, 3)


CASES = (
    "attention_pair_sr8_56x56",
    "attention_pair_sr4_28x56",
    "attention_pair_sr2_14x28",
    "attention_sr1_7x7",
    "block_sr2_14x14",
    "stem_merge_36x44",
    "model_tiny_224",
    "full_sgformer_s",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"sg_former/{case}.safetensors"))
    assert found.passed, found.why or found.skipped
