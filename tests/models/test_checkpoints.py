from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from glocal.models import CheckpointError, create_model, infer_variant, load_published, read_state
from glocal.models.checkpoints import fill
from glocal.models.vision.dinat import BlockSpec
from glocal.nn.blocks import resize_table

SMALL = {"dim": 8, "depths": (1, 1), "heads": (1, 2), "num_classes": 3}


@pytest.fixture
def small() -> torch.nn.Module:
    return create_model("nat_mini", **SMALL).eval()


@pytest.fixture(scope="module")
def mini() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = create_model("nat_mini", num_classes=10)
    return dict(model.state_dict())


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "ema", "prefixed", "safetensors"])
def test_reads_what_scripts_write(wrap: str, small: torch.nn.Module, tmp_path: Path) -> None:
    state, path = dict(small.state_dict()), tmp_path / "weights.pth"
    if wrap == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        content = {
            "plain": state,
            "state_dict": {"state_dict": state, "epoch": 3, "args": Namespace(lr=1e-3), "top1": np.float64(1)},
            "ema": {"model": {"a": torch.zeros(1)}, "model_ema": state},
            "prefixed": {"model": {f"module.{name}": value for name, value in state.items()}},
        }  # fmt: skip
        torch.save(content[wrap], path)
    model = load_published(path, create_model("nat_mini", **SMALL))
    image = torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(image), small(image)) and not model.training


def test_a_features_model_takes_the_trunk_of_a_classifier(small: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    model = load_published(tmp_path / "weights.pth", create_model("nat_mini", features_only=True, **SMALL))
    assert torch.equal(model.state_dict()["patch_embed.norm.weight"], small.state_dict()["patch_embed.norm.weight"])


def test_variant_by_shapes_and_file_name(mini: dict[str, torch.Tensor]) -> None:
    assert infer_variant(mini, "nat_mini_in1k_224.pth") == "nat_mini"
    with pytest.raises(CheckpointError, match=r"fit dinat_mini, nat_mini, which have equal shapes; say which"):
        infer_variant(mini, "model_best.pth")
    with pytest.raises(CheckpointError, match=r"no known variant has these 1 tensors \(a, \.\.\.\)"):
        infer_variant({"a": torch.zeros(1)})


def test_says_what_does_not_fit(small: torch.nn.Module, mini: dict[str, torch.Tensor]) -> None:
    state = dict(small.state_dict())
    state["levels.0.blocks.0.attn.rbp"] = state.pop("levels.0.blocks.0.attn.rpb")
    state["norm.weight"] = torch.ones(7)
    with pytest.raises(CheckpointError) as error:
        fill(small, state, "mine.pth")
    text = str(error.value)
    assert "mine.pth does not fit NAT" in text
    assert "1 missing: levels.0.blocks.0.attn.rpb (nearest: levels.0.blocks.0.attn.rbp)" in text
    assert "1 unexpected: levels.0.blocks.0.attn.rbp" in text
    assert "norm.weight is (7,), the model has (16,)" in text
    with pytest.raises(CheckpointError, match="the file has the weights of dinat_mini or nat_mini"):
        fill(small, mini, "other.pth")


def test_tables_of_another_window_are_resized_when_asked(small: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    wide = create_model("nat_mini", spec=BlockSpec(window=11), **SMALL)
    with pytest.raises(CheckpointError, match=r"load_published\(\.\.\., resize=True\) interpolates them"):
        load_published(tmp_path / "weights.pth", wide)
    load_published(tmp_path / "weights.pth", wide, resize=True)
    name = "levels.1.blocks.0.attn.rpb"
    assert torch.equal(wide.state_dict()[name], resize_table(small.state_dict()[name], (21, 21)))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_state(tmp_path / "absent.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"hello")
        with pytest.raises(CheckpointError, match=f"{name}: neither .safetensors nor a file of torch.save"):
            read_state(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="no state dict found; top-level names: epoch"):
        read_state(tmp_path / "odd.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read_state(tmp_path / "list.pth")
