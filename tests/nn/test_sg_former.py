from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.nn.mixer import begin, mixer
from glocal.nn.sg_former import HybridScaleAttention, SelfGuidedAttention
from glocal.testing.layer_tester import LayerTester


class Stage(torch.nn.Module):
    """The two mixers of a stage and the map between them."""

    def __init__(self, reduction: int) -> None:
        super().__init__()
        self.mixers = torch.nn.ModuleList([mixer("sg_former", 8, 2, block=j, reduction=reduction) for j in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        stage = begin(self.mixers, x)
        return self.mixers[1](self.mixers[0](x, stage), stage)


class TestStage(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 2, 8))

    def make(self) -> Stage:
        return Stage(2)

    def bad(self):
        layer = SelfGuidedAttention(8, 2)
        return [
            (lambda: layer(torch.zeros(2, 4, 4, 8)), "block 1 needs a significance map of shape (2, 4, 4)"),
            (lambda: layer(torch.zeros(2, 4, 4, 8), {0: torch.zeros(2, 4, 5)}), "a hybrid layer in block 0"),
            (lambda: SelfGuidedAttention(8, 2, 3), "reduction=3; legal: 8, 4, 2"),
            (lambda: HybridScaleAttention(8, 2, 0), "reduction=0 must be at least 1"),
            (lambda: HybridScaleAttention(9, 3), "heads=3 must be even"),
        ]


class TestPlain(LayerTester):
    shapes = ((2, 5, 4, 8), (1, 2, 2, 8))

    def make(self) -> torch.nn.Module:
        return mixer("sg_former", 8, 2, reduction=1)


@pytest.mark.parametrize(("reduction", "size"), [(2, (9, 12)), (4, (10, 7)), (8, (16, 21))])
def test_significance_is_attention_received(reduction: int, size: tuple[int, int], generator: torch.Generator) -> None:
    """Coarse shares sum to 1 over cells, fine ones to 1 in each window, whether or not the map is padded."""
    layer = HybridScaleAttention(8, 2, reduction)
    x = torch.randn(2, *size, 8, generator=generator)
    coarse, fine = layer._coarse(x)[1], layer._local(x)[1]
    assert torch.allclose(coarse[:, ::reduction, ::reduction].sum((1, 2)), torch.ones(2))
    windows = -(-size[0] // 7) * -(-size[1] // 7)
    assert torch.allclose(fine.sum((1, 2)), torch.full((2,), float(windows)))
    assert not layer.measure(x)[1].requires_grad


@pytest.mark.parametrize(("reduction", "count", "short"), [(8, 3136, 60), (4, 784, 60), (2, 196, 147), (8, 100, 15)])
def test_length_of_the_merged_sequence(reduction: int, count: int, short: int) -> None:
    layer = SelfGuidedAttention(4, 2, reduction)
    assert layer.merge(torch.zeros(1, count, 4), torch.rand(1, count)).shape == (1, short, 4)


def test_only_ranks_matter(generator: torch.Generator) -> None:
    layer = SelfGuidedAttention(8, 2)
    x, significance = torch.randn(2, 6, 6, 8, generator=generator), torch.rand(2, 6, 6, generator=generator)
    assert torch.equal(layer.guided(x, significance), layer.guided(x, significance.exp() * 3))


def test_padding_of_windows_is_not_seen(generator: torch.Generator) -> None:
    """Values of a map's only window do not change when the map ends early."""
    layer = HybridScaleAttention(8, 2, 1)
    x = torch.randn(1, 5, 7, 8, generator=generator)
    before = layer._local(x)[0]
    layer.kv2.bias.data += 100 * torch.cat((torch.zeros(4), torch.ones(4)))  # padding would get these values too
    assert torch.allclose(layer._local(x)[0], before + 100, atol=1e-4)
