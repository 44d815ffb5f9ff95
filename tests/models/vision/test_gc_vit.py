from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models import create_model
from glocal.models.checkpoints import fill
from glocal.models.vision.gc_vit import DENSE_WINDOWS, BlockSpec, GCViT, _pools
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dim": 8, "depths": (2, 3), "heads": (1, 2), "windows": (4, 3)}


class TestGCViT(BackboneTester):
    def make(self, **keywords: Any) -> GCViT:
        return GCViT(**SHAPE, spec=BlockSpec(layer_scale=0.5), **keywords)

    def bad(self):
        return [
            (lambda: GCViT(8, (1, 1), (1,)), "GCViT: heads=(1,) has 1 entries; it needs 2, one a stage"),
            (lambda: GCViT(8, (1, 1), (1, 1), (7, 7, 7)), "GCViT: windows=(7, 7, 7) has 3 entries"),
            (lambda: GCViT(9, (1,), (2,), (7,)), "heads=2 must divide dim=9"),
        ]


class TestPublishedWindows(BackboneTester):
    """Windows that fit the maps, and a level whose queries are not pooled."""

    sizes = ((64, 64), (45, 70))

    def make(self, **keywords: Any) -> GCViT:
        return GCViT(4, (2, 2), (1, 1), (8, 4), spec=BlockSpec(pools=(1, 0), relative_bias=False), **keywords)


CASES = (
    "attn_local_w3",
    "attn_global_w3",
    "global_query_gen_r24_w3",
    "stage_r24_w3",
    "rpb_table_resize_7to24",
    "model_tiny_r64",
    "dense_tiny_70x92",
    "full_gc_vit_tiny",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"gc_vit/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


def test_query_pools_follow_the_windows() -> None:
    assert _pools((7, 7, 14, 7)) == (3, 2, 0, 0) and _pools(DENSE_WINDOWS) == (3, 2, 1, 0)


def test_other_token_mixers_fit_in() -> None:
    model = GCViT(**SHAPE, num_classes=2, spec=BlockSpec(mixer="davit"))
    assert model(torch.zeros(1, 3, 40, 40)).shape == (1, 2) and model.levels[0].q_global_gen is None


TIMM = (
    ("patch_embed.proj.", "stem.conv1."),
    ("patch_embed.conv_down.", "stem.down."),
    ("levels.0.downsample.", "stages.1.downsample."),
    ("levels.", "stages."),
    (".q_global_gen.to_q_global.0.", ".global_block.blocks.conv1."),
    (".q_global_gen.to_q_global.1.", ".global_block.blocks.conv2."),
    (".conv.0.", ".conv_block.conv_dw."),
    (".conv.2.fc.0.", ".conv_block.se.fc1."),
    (".conv.2.fc.2.", ".conv_block.se.fc2."),
    (".conv.3.", ".conv_block.conv_pw."),
    (".attn.relative", ".attn.rel_pos.relative"),
    (".gamma1", ".ls1.gamma"),
    (".gamma2", ".ls2.gamma"),
)


def timm_name(name: str) -> str:
    for ours, theirs in TIMM:
        name = name.replace(ours, theirs)
    name = name.replace("head.", "head.fc.") if name.startswith("head.") else name
    name = f"stages.3.{name}" if name.startswith("norm.") else name
    return name.replace("conv_block.", "") if ".global_block." in name else name


def test_reads_timms_layout() -> None:
    model = GCViT(**SHAPE, num_classes=3, spec=BlockSpec(layer_scale=0.5, pools=(2, 1)))
    wanted = {name: value + 1 for name, value in model.state_dict().items()}
    other = {timm_name(n): v[..., None, None] if ".conv.2.fc." in n else v for n, v in wanted.items()}
    assert "stages.0.global_block.blocks.conv2.se.fc1.weight" in other
    fill(model, other)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_equals_timms() -> None:
    import timm  # type: ignore[import-not-found]

    reference = timm.create_model("gcvit_xxtiny", num_classes=7).eval()
    model = create_model("gc_vit_xxtiny", num_classes=7).eval()
    fill(model, reference.state_dict())
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(image)
        assert float((model(image) - wanted).abs().max() / wanted.abs().max()) < 1e-4
