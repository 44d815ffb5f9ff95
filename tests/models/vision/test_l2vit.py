from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glocal.models.vision.l2vit import BlockSpec, L2ViT
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (2, 2), "heads": (2, 4)}


class TestL2ViT(BackboneTester):
    def make(self, **keywords: Any) -> L2ViT:
        return L2ViT(**SHAPE, spec=BlockSpec(window=4, floor=1.0), **keywords)

    def bad(self):
        return [(lambda: L2ViT((8, 16), (2,), (2, 2)), "L2ViT: depths=(2,) has 1 entries; it needs 2, one a stage")]


class TestWithoutConvolutions(BackboneTester):
    def make(self, **keywords: Any) -> L2ViT:
        return L2ViT(**SHAPE, spec=BlockSpec(window=4, local=0, mask_padding=True), **keywords)


@pytest.mark.parametrize("case", ["lcm", "lga_block", "linear_attention", "lwa_block", "model_tiny"])
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"l2vit/{case}.safetensors"))
    assert found.passed, found.why or found.skipped
