from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models.vision.inline import BlockSpec, InLineCSWin, InLineDeiT, InLinePVT, InLineSpec, InLineSwin
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester


class TestDeiT(BackboneTester):
    """The classifier reads the class token, which the local part of the last block does not reach."""

    sizes = ((40, 72), (32, 32))
    unused = ("blocks.1.attn.residual.0.weight", "blocks.1.attn.residual.0.bias",
              "blocks.1.attn.residual.2.weight", "blocks.1.attn.residual.2.bias")  # fmt: skip

    def make(self, **keywords: Any) -> InLineDeiT:
        return InLineDeiT(16, 2, 2, img_size=32, patch=8, **keywords)

    def bad(self):
        return [(lambda: InLineDeiT(spec=BlockSpec((2.0, 2.0))), "InLineDeiT: mlp_ratio=(2.0, 2.0) has 2 entries")]


class TestPVT(BackboneTester):
    def make(self, **keywords: Any) -> InLinePVT:
        spec = BlockSpec(2.0, InLineSpec("relu", split_kv=True))
        return InLinePVT((8, 16), (1, 2), (2, 4), img_size=64, spec=spec, **keywords)


class TestMixedPVT(BackboneTester):
    def make(self, **keywords: Any) -> InLinePVT:
        spec = BlockSpec(2.0, InLineSpec(split_kv=True))
        stages: dict[str, Any] = {"inline": (False, True, False), "reductions": (4, 1, 2)}
        return InLinePVT((8, 16, 24), (1, 1, 2), (2, 4, 3), img_size=64, spec=spec, **stages, **keywords)

    def bad(self):
        return [(lambda: InLinePVT(inline=(True, False)), "InLinePVT: inline=(True, False) has 2 entries; it needs 4")]


class TestSwin(BackboneTester):
    def make(self, **keywords: Any) -> InLineSwin:
        return InLineSwin(8, (2, 2), (2, 4), (2, 0), 8, BlockSpec(2.0), img_size=64, **keywords)

    def bad(self):
        return [(lambda: InLineSwin(inline=(2, 2)), "InLineSwin: inline=(2, 2) has 2 entries; it needs 4")]


class TestCSWin(BackboneTester):
    def make(self, **keywords: Any) -> InLineCSWin:
        return InLineCSWin(8, (1, 2, 1), (2, 4, 4), (True, False, False), (1, 2, None), BlockSpec(2.0), **keywords)


CASES = (
    "attention_deit_cls",
    "attention_identity",
    "attention_pvt_nonsquare",
    "attention_relu",
    "model_cswin_tiny",
    "model_deit_tiny",
    "model_pvt_tiny",
    "model_swin_tiny",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"inline/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


def test_a_mixer_of_ones_own_stands_in() -> None:
    model = InLineSwin(8, (2, 1), (2, 4), (1, 0), spec=BlockSpec(2.0, mixer="l2vit"), num_classes=3)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
