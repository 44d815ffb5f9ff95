from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models import create_model
from glocal.models.checkpoints import CheckpointError, fill
from glocal.models.vision.maxvit import BlockSpec, MaxViT
from glocal.nn.blocks import resize_table
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (1, 2), "stem": (4, 8)}


class TestMaxViT(BackboneTester):
    def make(self, **keywords: Any) -> MaxViT:
        return MaxViT(**SHAPE, spec=BlockSpec(window=3, grid=2, head_size=8), **keywords)

    def bad(self):
        return [
            (lambda: MaxViT((8, 16), (1,)), "MaxViT: depths=(1,) has 1 entries; it needs 2, one a stage"),
            (lambda: MaxViT((40,), (1,)), "head_size=32 must divide every width; 40 is none, 32 is near"),
        ]


class TestFineTuned(BackboneTester):
    """Tables of windows of 2, read for 4; one for all heads."""

    sizes = ((64, 64),)

    def make(self, **keywords: Any) -> MaxViT:
        return MaxViT(**SHAPE, spec=BlockSpec(4, 4, head_size=4, trained=2, shared_bias=True), **keywords)


CASES = (
    "partition_6x8_2",
    "attention_scale_ratio_w12",
    "model_tiny_64x64_w2_g2",
    "model_tiny_128x128_w4_g2",
    "full_maxvit_tiny_tf_224",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"maxvit/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


def test_one_block_sees_the_whole_map() -> None:
    model = MaxViT((8,), (1,), (4, 8), spec=BlockSpec(2, 2, head_size=8)).eval()
    block = model.get_submodule("stages.0.blocks.0")
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    half = block.get_submodule("attn_block")(x)
    (near,) = torch.autograd.grad(half[0, 0, 0].sum(), x, retain_graph=True)
    (far,) = torch.autograd.grad(block.get_submodule("attn_grid")(half)[0, 0, 0].sum(), x)
    reached = [int((grad[0].abs().sum(-1) > 0).sum()) for grad in (near, far)]
    assert reached == [4, 16]  # one window; then the windows of one token of each quarter


def test_tables_of_another_window_are_resized_bilinearly() -> None:
    small, large = (MaxViT(**SHAPE, spec=BlockSpec(side, side, head_size=8)) for side in (2, 4))
    state = {name: value for name, value in small.state_dict().items() if not name.endswith("num_batches_tracked")}
    with pytest.raises(CheckpointError, match=r"relative tables of another window.*resize=True"):
        fill(large, state)
    fill(large, state, resize=True)
    name = "stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table"
    assert torch.allclose(large.state_dict()[name], resize_table(state[name], (7, 7), "bilinear"))
    kept = MaxViT(**SHAPE, spec=BlockSpec(4, 4, head_size=8, trained=2)).eval()
    fill(kept, state)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(kept(image), large.eval()(image), atol=1e-5)


def test_other_token_mixers_fit_in() -> None:
    spec = BlockSpec(head_size=8, mixer="gc_vit")
    model = MaxViT(**SHAPE, num_classes=2, spec=spec).eval()
    assert model(torch.zeros(1, 3, 40, 40)).shape == (1, 2)


def test_the_classifier_changes_alone() -> None:
    with torch.device("meta"):
        model: Any = create_model("maxvit_tiny_tf_224", num_classes=7)
    assert model.head.fc.out_features == 7


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_equals_timms() -> None:
    import timm  # type: ignore[import-not-found]

    reference = timm.create_model("maxvit_tiny_tf_224", num_classes=7).eval()
    model = create_model("maxvit_tiny_tf_224", num_classes=7).eval()
    fill(model, reference.state_dict())
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(image)
        assert float((model(image) - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_a_table_for_all_heads_is_resized_too() -> None:
    small, large = (MaxViT(**SHAPE, spec=BlockSpec(n, n, head_size=4, shared_bias=True)) for n in (2, 3))
    fill(large, small.state_dict(), resize=True)
    assert large.state_dict()["stages.0.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table"].shape == (5, 5)
