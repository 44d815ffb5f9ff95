"""The dense head."""

from __future__ import annotations

import pytest
import torch

from glocal.models import create_model
from glocal.models.segment import Segmenter


def test_logits_have_the_size_of_the_image() -> None:
    trunk = create_model("litv2_s", features_only=True, dim=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8))
    model = Segmenter(trunk, 5, width=16)  # type: ignore[arg-type]
    image = torch.randn(1, 3, 70, 64, requires_grad=True)
    y = model(image)
    assert y.shape == (1, 5, 70, 64)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_needs_a_features_model() -> None:
    trunk = create_model("litv2_s", dim=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8))
    with pytest.raises(ValueError, match="LITv2 must be made with features_only=True"):
        Segmenter(trunk, 5)  # type: ignore[arg-type]
