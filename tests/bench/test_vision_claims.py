"""The rivals that the driver of the backbones' claims makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from glocal.models import create_model

DRIVER = Path(__file__).parents[2] / "bench" / "vision_claims.py"


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vision_claims", DRIVER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fused", [False, True])
def test_a_softmax_twin_of_deit_sees_its_class_token(claims: ModuleType, fused: bool) -> None:
    model = create_model("inline_deit_tiny", dim=12, heads=2, depth=1, img_size=32, patch=8, num_classes=3).eval()
    layer = claims.twin(model, fused).blocks[0].attn
    x = torch.randn(2, 1 + 4 * 4, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
        wanted = layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        assert torch.allclose(layer(x, (4, 4)), wanted, atol=1e-5)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_softmax_twin_of_swin_attends_inside_its_windows(claims: ModuleType) -> None:
    model = create_model("inline_swin_tiny", dim=12, depths=(1, 1, 1, 1), num_classes=3, img_size=32).eval()
    with torch.no_grad():
        plain = model(image := torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        other = claims.twin(model, True)(image)
    assert other.shape == plain.shape and not torch.allclose(other, plain)
