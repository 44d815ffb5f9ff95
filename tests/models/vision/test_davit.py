from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models import create_model
from glocal.models.checkpoints import fill
from glocal.models.vision.davit import BlockSpec, DaViT
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (1, 2), "heads": (2, 4)}


class TestDaViT(BackboneTester):
    def make(self, **keywords: Any) -> DaViT:
        return DaViT(**SHAPE, spec=BlockSpec(window=4), **keywords)

    def bad(self):
        return [
            (lambda: DaViT((8, 16), (1,), (2, 2)), "DaViT: depths=(1,) has 1 entries; it needs 2, one a stage"),
            (lambda: BlockSpec(types=("spatial", "temporal")), "each must be 'spatial' or 'channel'"),  # type: ignore[arg-type]
        ]


class TestFlorence(BackboneTester):
    def make(self, **keywords: Any) -> DaViT:
        return DaViT(**SHAPE, overlapped=True, spec=BlockSpec(window=3, channel="v2", cpe_act=True), **keywords)


class TestWithoutFeedForward(BackboneTester):
    def make(self, **keywords: Any) -> DaViT:
        return DaViT(**SHAPE, spec=BlockSpec(window=4, ffn=False, types=("channel",)), **keywords)


CASES = (
    "channel_attention_n35",
    "channel_attention_v2_n35",
    "spatial_block_9x13",
    "channel_block_9x13",
    "model_tiny_64x64",
    "model_tiny_75x109_overlap",
    "full_DaViT_tiny",
)
TIMM = (
    ("patch_embeds.0.proj", "stem.conv"),
    ("patch_embeds.0.norm", "stem.norm"),
    ("patch_embeds.1.proj", "stages.1.downsample.conv"),
    ("patch_embeds.1.norm", "stages.1.downsample.norm"),
    ("main_blocks.0.", "stages.0.blocks."),
    ("main_blocks.1.", "stages.1.blocks."),
    ("cpe.0", "cpe1"),
    ("cpe.1", "cpe2"),
    ("norms.", "head.norm."),
    ("head.weight", "head.fc.weight"),
    ("head.bias", "head.fc.bias"),
)
FLORENCE = (
    ("cpe.0.proj", "conv1.fn.dw"),
    ("cpe.1.proj", "conv2.fn.dw"),
    ("norm1", "{attn}.norm"),
    ("attn.", "{attn}.fn."),
    ("norm2", "ffn.norm"),
    ("mlp", "ffn.fn.net"),
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"davit/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


def timm_name(name: str) -> str:
    for ours, theirs in TIMM:
        name = name.replace(ours, theirs)
    return name


def florence_name(name: str) -> str:
    if not name.startswith("main_blocks."):
        return name.replace("patch_embeds.", "convs.")
    _, level, block, kind, rest = name.split(".", 4)
    attn = "window_attn" if kind == "0" else "channel_attn"
    for ours, theirs in FLORENCE:
        if rest.startswith(ours):
            rest = theirs.format(attn=attn) + rest.removeprefix(ours)
            break
    return f"blocks.{level}.{block}.{('spatial_block', 'channel_block')[int(kind)]}.{rest}"


@pytest.mark.parametrize("rename", [timm_name, florence_name])
def test_reads_other_layouts(rename: Callable[[str], str]) -> None:
    model = DaViT(**SHAPE, num_classes=3)
    wanted = {name: value + 1 for name, value in model.state_dict().items()}
    fill(model, {rename(name): value for name, value in wanted.items()})
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_published_towers_have_no_classifier() -> None:
    with torch.device("meta"):
        model: Any = create_model("davit_base_florence2")
    assert isinstance(model.head, torch.nn.Identity)
