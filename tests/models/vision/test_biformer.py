from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models.checkpoints import fill
from glocal.models.vision.biformer import BiFormer, BiFormerSTL, BlockSpec
from glocal.nn.bilevel_routing import RoutingSpec
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (1, 2)}
SPEC: dict[str, Any] = {"regions": 2, "head_dim": 4, "mlp_ratio": 2.0, "routing": RoutingSpec(lepe=3)}


class TestBiFormer(BackboneTester):
    compiles = False  # regions are chosen by content

    def make(self, **keywords: Any) -> BiFormer:
        return BiFormer(**SHAPE, tops=(2, -2), spec=BlockSpec(**SPEC), **keywords)

    def bad(self):
        return [
            (lambda: BiFormer((8, 16), (1,), (1, 1)), "BiFormer: depths=(1,) has 1 entries; it needs 2, one a stage"),
            (lambda: BiFormer(**SHAPE, tops=(1, -3), spec=BlockSpec(**SPEC)), "tops has -3; legal: 1 and more, 0, -1"),
            (lambda: BlockSpec(form="nhwc"), "form='nhwc'; legal: 'released', 'nchw'"),  # type: ignore[arg-type]
            (lambda: BlockSpec(position=2), "position=2 must be odd or 0, for example 3"),
        ]


class TestPostNorm(BackboneTester):
    def make(self, **keywords: Any) -> BiFormer:
        spec = BlockSpec(**SPEC, pre_norm=False, mlp_dwconv=True, layer_scale=0.5)
        return BiFormer(**SHAPE, tops=(0, -1), spec=spec, **keywords)


class TestSwinShaped(BackboneTester):
    compiles = False

    def make(self, **keywords: Any) -> BiFormerSTL:
        return BiFormerSTL(**SHAPE, tops=(1, -2), spec=BlockSpec(**SPEC, position=0), **keywords)


class TestRefactored(BackboneTester):
    compiles = False

    def make(self, **keywords: Any) -> BiFormerSTL:
        spec = BlockSpec(**SPEC, position=0, form="nchw", norm="batch")
        return BiFormerSTL(**SHAPE, tops=(1, -1), spec=spec, **keywords)


CASES = (
    "attention_lepe",
    "attention_lepe_nchw",
    "bra_legacy_autopad",
    "bra_legacy_exact",
    "bra_legacy_kvpool",
    "bra_nchw_exact",
    "bra_nchw_odd",
    "model_tiny",
    "model_tiny_stl_nchw",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"biformer/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


def test_reads_the_norms_of_dense_prediction() -> None:
    model = BiFormer(**SHAPE, tops=(1, 0), spec=BlockSpec(**SPEC), features_only=True)
    wanted = {name: value + 1 for name, value in model.state_dict().items()}
    fill(model, {n.replace("norm0.", "extra_norms.0.").replace("norm1.", "extra_norms.1.")
                 if n.startswith("norm") else n: v for n, v in wanted.items()})  # fmt: skip
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
