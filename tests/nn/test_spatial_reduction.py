"""Attention to reduced maps beside the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from glocal.nn.spatial_reduction import SpatialReductionAttention


@pytest.mark.parametrize(("reduction", "pool"), [(2, None), (1, None), (1, 3)])
def test_every_token_reads_the_reduced_map(reduction: int, pool: int | None) -> None:
    torch.manual_seed(0)
    layer = SpatialReductionAttention(12, 3, reduction, pool).double()
    x = torch.randn(2, 7, 9, 12, dtype=torch.float64)
    image = x.permute(0, 3, 1, 2)
    if pool is not None:
        cells = F.conv2d(F.adaptive_avg_pool2d(image, pool), layer.sr.weight, layer.sr.bias)
        keys = F.gelu(F.layer_norm(cells.flatten(2).mT, (12,), layer.norm.weight, layer.norm.bias))
    elif reduction > 1:
        cells = F.conv2d(
            image, layer.sr.weight, layer.sr.bias, stride=reduction
        )  # the last row and column are left out
        keys = F.layer_norm(cells.flatten(2).mT, (12,), layer.norm.weight, layer.norm.bias)
        assert keys.shape[1] == 3 * 4
    else:
        keys = image.flatten(2).mT
    q = layer.q(x.flatten(1, 2)).reshape(2, 63, 3, 4)
    k, v = (t.reshape(2, -1, 3, 4) for t in layer.kv(keys).chunk(2, -1))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 2).softmax(-1)
    expected = layer.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)).reshape(x.shape)
    assert torch.allclose(layer(x), expected, atol=1e-9)


def test_maps_below_a_cell_are_padded() -> None:
    layer = SpatialReductionAttention(8, 2, 4)
    assert layer(torch.randn(1, 3, 5, 8)).shape == (1, 3, 5, 8)


def test_bad_settings_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="reduction=0 must be at least 1"):
        SpatialReductionAttention(8, 2, 0)
    with pytest.raises(ValueError, match="heads=3 must divide dim=8; nearest number of heads that does: 2"):
        SpatialReductionAttention(8, 3)
