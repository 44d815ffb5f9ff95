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


@pytest.mark.parametrize("case", ["channel_attention_n35", "channel_attention_v2_n35", "spatial_block_9x13",
                                  "channel_block_9x13", "model_tiny_64x64", "model_tiny_75x109_overlap", "full_DaViT_tiny"])  # fmt: skip
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"davit/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


@pytest.mark.parametrize("layout", ["timm", "florence"])
def test_reads_other_layouts(layout: str) -> None:
    names = {
        "timm": (("patch_embeds.0.proj", "stem.conv"), ("patch_embeds.0.norm", "stem.norm"),
                 ("patch_embeds.1.proj", "stages.1.downsample.conv"),
                 ("patch_embeds.1.norm", "stages.1.downsample.norm"), ("main_blocks.0.", "stages.0.blocks."), ("main_blocks.1.", "stages.1.blocks."), ("cpe.0", "cpe1"),
                 ("cpe.1", "cpe2"), ("norms.", "head.norm."), ("head.weight", "head.fc.weight"),
                 ("head.bias", "head.fc.bias")),
        "florence": (("patch_embeds.", "convs."), ("main_blocks.", "blocks.")),
    }  # fmt: skip
    model = DaViT(**SHAPE, num_classes=3)
    state = {}
    for name, value in model.state_dict().items():
        other = name
        for ours, theirs in names[layout]:
            other = other.replace(ours, theirs)
        if layout == "florence" and other.startswith("blocks."):
            head, i, j, kind, rest = other.split(".", 4)
            attn = "window_attn" if kind == "0" else "channel_attn"
            for ours, theirs in (("cpe.0.proj", "conv1.fn.dw"), ("cpe.1.proj", "conv2.fn.dw"),
                                 ("norm1", f"{attn}.norm"), ("attn.", f"{attn}.fn."), ("norm2", "ffn.norm"), ("mlp", "ffn.fn.net")):  # fmt: skip
                rest = rest.replace(ours, theirs) if rest.startswith(ours) else rest
            other = ".".join((head, i, j, ("spatial_block", "channel_block")[int(kind)], rest))
        state[other] = value + 1
    fill(model, state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in zip(model.state_dict(), state.values()))


def test_published_towers_have_no_classifier() -> None:
    with torch.device("meta"):
        model: Any = create_model("davit_base_florence2")
    assert isinstance(model.head, torch.nn.Identity)
