"""ViT as a trunk."""

from __future__ import annotations

from typing import Any

import torch

from glocal.models.trunks.vit import ViT
from glocal.testing.backbone_tester import BackboneTester


class TestViT(BackboneTester):
    sizes = ((48, 64), (64, 64))
    common = ((224, 224), (384, 384), (512, 688))

    def make(self, **keywords: Any) -> ViT:
        return ViT(24, 2, 3, img_size=64, patch=16, **keywords)

    def side(self, length: int, stride: int) -> int:
        return length // stride


def test_other_sizes_move_the_positions() -> None:
    torch.manual_seed(0)
    model = ViT(24, 1, 3, img_size=64, num_classes=4).eval()
    image = torch.randn(1, 3, 64, 64)
    assert model(image).shape == model(image[:, :, :32]).shape == (1, 4)
