"""Names of the authors' checkpoints to timm's and back."""

from __future__ import annotations

import pytest
import torch

from glocal.models import create_model


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("davit_tiny", "stages.2.blocks.1.1.cpe2.proj.weight"),
        ("gc_vit_small", "stages.1.global_block.blocks.conv2.se.fc1.weight"),
        ("maxvit_tiny_tf_224", "stages.3.blocks.1.attn_grid.attn.rel_pos.relative_position_bias_table"),
    ],
)
def test_there_and_back(name: str, sample: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    state = model.state_dict()
    theirs = type(model).to_timm(state)  # type: ignore[attr-defined]
    assert sample in theirs
    back = type(model).convert(theirs)  # type: ignore[attr-defined]
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    timm = pytest.importorskip("timm", reason="timm is not installed: names compared with themselves alone")
    with torch.device("meta"):
        other = timm.create_model(name.replace("gc_vit", "gcvit"), num_classes=1000)
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in other.state_dict().items()}
