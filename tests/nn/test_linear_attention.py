from __future__ import annotations

import torch
from torch import nn

from glocal.nn.l2vit import UnpaddedWindowAttention
from glocal.nn.linear_attention import EnhancedLinearAttention, LocalConcentration
from glocal.nn.window_attention import WindowAttention
from glocal.testing.layer_tester import LayerTester


class TestLinear(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 1, 8))

    def make(self) -> EnhancedLinearAttention:
        return EnhancedLinearAttention(8, 2, floor=1.0)

    def bad(self):
        return [(lambda: EnhancedLinearAttention(8, 2, floor=0.0), "floor=0.0 must be positive; published: 100")]


class TestConcentration(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 1, 8))

    def make(self) -> LocalConcentration:
        return LocalConcentration(8)

    def bad(self):
        return [(lambda: LocalConcentration(8, 4), "kernel=4 must be odd, for example 5")]


class TestUnpadded(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 4, 4, 8))

    def make(self) -> nn.Module:
        return UnpaddedWindowAttention(8, 2, window=4)


def test_token_order_does_not_matter(generator: torch.Generator) -> None:
    layer, x = EnhancedLinearAttention(8, 2), torch.randn(1, 4, 5, 8, generator=generator)
    order = torch.randperm(20, generator=generator)
    assert torch.allclose(layer(x.flatten(1, 2)[:, order]), layer(x).flatten(1, 2)[:, order], atol=1e-5)


def test_padding_is_no_key(generator: torch.Generator) -> None:
    layer, small = UnpaddedWindowAttention(8, 2, window=5), WindowAttention(8, 2, window=3)
    small.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 3, 8, generator=generator)
    assert torch.allclose(layer(x), small(x), atol=1e-5)
