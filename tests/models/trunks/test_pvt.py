"""PVT and PVT v2 as trunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glocal.models import create_model
from glocal.models.registry import variant
from glocal.models.trunks.pvt import PVT
from glocal.models.trunks.pvt_v2 import BlockSpec, PVTv2
from glocal.testing.backbone_tester import BackboneTester


class TestPVT(BackboneTester):
    def make(self, **keywords: Any) -> PVT:
        return PVT((8, 16), (1, 2), (1, 2), (2, 1), (2.0, 2.0), 32, **keywords)

    def bad(self):
        return [(lambda: PVT((8, 16), (1, 1), (1, 2), (2, 2), (2.0, 2.0)), "reductions=(2, 2) must end with 1")]


class TestPVTv2(BackboneTester):
    def make(self, **keywords: Any) -> PVTv2:
        return PVTv2((8, 16), (1, 2), (1, 2), spec=BlockSpec((2.0, 2.0), (2, 1)), **keywords)


class TestLinear(BackboneTester):
    def make(self, **keywords: Any) -> PVTv2:
        return PVTv2((8, 16), (1, 2), (1, 2), spec=BlockSpec((2.0, 2.0), (2, 1), linear=True), **keywords)


@pytest.mark.parametrize(("name", "millions"), [("pvt_tiny", 13.2), ("pvt_large", 61.4), ("pvt_v2_b2_li", 22.6)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1) == millions and variant(name).params in (None, count)


def test_names_are_the_published_ones() -> None:
    with torch.device("meta"):
        first, second = create_model("pvt_tiny").state_dict(), create_model("pvt_v2_b2_li").state_dict()
    shapes = {"pos_embed1": (1, 3136, 64), "pos_embed4": (1, 50, 512), "cls_token": (1, 1, 512), "norm.weight": (512,),
              "block1.0.attn.sr.weight": (64, 64, 8, 8), "block4.1.mlp.fc1.weight": (2048, 512)}  # fmt: skip
    assert {name: tuple(first[name].shape) for name in shapes} == shapes and "block4.0.attn.sr.weight" not in first
    shapes = {"patch_embed1.proj.weight": (64, 3, 7, 7), "patch_embed2.proj.weight": (128, 64, 3, 3),
              "block1.2.mlp.dwconv.dwconv.weight": (512, 1, 3, 3), "block4.0.attn.sr.weight": (512, 512, 1, 1),
              "norm3.bias": (320,)}  # fmt: skip
    assert {name: tuple(second[name].shape) for name in shapes} == shapes


def test_the_class_token_leads() -> None:
    """Positions of the token and of the map are told apart, and the token's last state is what is classified."""
    torch.manual_seed(0)
    model = PVT((8, 16), (1, 1), (1, 2), (2, 1), (2.0, 2.0), 32, num_classes=3).eval()
    image = torch.randn(2, 3, 32, 32)
    maps, tokens = model.walk(image)
    assert tokens.shape == (2, 1 + 16, 16) and maps[1].shape == (2, 4, 4, 16)
    assert torch.equal(tokens[:, 1:].reshape(2, 4, 4, 16), maps[1])
    assert torch.allclose(model(image), model.head(model.norm(tokens[:, 0])), atol=1e-6)
    before = model.walk(image)[1]
    with torch.no_grad():
        model.pos_embed2[:, 0] += 1  # type: ignore[index]
    assert (model.walk(image)[1] - before).abs().max() > 1e-3


def test_dense_models_load_the_classifiers_weights() -> None:
    from glocal.models.checkpoints import fill

    state = PVT((8, 16), (1, 1), (1, 2), (2, 1), (2.0, 2.0), 32).state_dict()
    dense = PVT((8, 16), (1, 1), (1, 2), (2, 1), (2.0, 2.0), 32, features_only=True)
    fill(dense, state, "weights")
    assert torch.equal(dense.state_dict()["cls_token"], state["cls_token"])
