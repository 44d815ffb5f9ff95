from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.nn.duoformer import GroupAttention, PatchMixer, ScaleMixer, region_tokens
from glocal.nn.mixer import begin, mixer
from glocal.testing.layer_tester import LayerTester


class Stage(torch.nn.Module):
    """The two mixers of a stage and the scales they share."""

    def __init__(self, scales: int = 3) -> None:
        super().__init__()
        self.mixers = torch.nn.ModuleList([mixer("duoformer", 8, 2, block=j, scales=scales) for j in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        stage = begin(self.mixers, x)
        return self.mixers[1](self.mixers[0](x, stage), stage)


class TestStage(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 5, 4, 8))

    def make(self) -> Stage:
        return Stage()

    def bad(self):
        layer = ScaleMixer(8, 2)
        return [
            (lambda: layer(torch.zeros(2, 8, 8, 8)), "stage=None must be the coarse tokens of the regions"),
            (lambda: layer(torch.zeros(2, 8, 8, 8), torch.zeros(1, 4, 5, 8)), "of shape (2, 4, 5, 8)"),
            (lambda: ScaleMixer(8, 2, 0), "scales=0 must be at least 1"),
            (lambda: PatchMixer(8, 2, 0), "side=0 must be at least 1"),
            (lambda: GroupAttention(8, 3), "heads=3 must divide dim=8; nearest number of heads that does: "),
        ]


class TestOneScale(LayerTester):
    shapes = ((2, 3, 4, 8), (1, 2, 3, 8))

    def make(self) -> Stage:
        return Stage(scales=1)

    def test_every_parameter_learns(self) -> None:
        """One token a region: nothing to choose from, so queries and keys of the first mixer have no gradient."""
        layer = self.layer()
        x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
        layer(x).square().sum().backward()
        grad = layer.get_parameter("mixers.0.attn.qkv.weight").grad
        assert grad is not None and bool((grad[16:] != 0).any()) and float(grad[:16].abs().max()) < 1e-6


def test_tokens_are_the_cells_of_their_region() -> None:
    """A map whose value is the region's index gives that index alone, on every scale."""
    index = torch.arange(6.0).reshape(1, 2, 3, 1)
    maps = [index.repeat_interleave(2**k, 1).repeat_interleave(2**k, 2) for k in range(4)]
    tokens = region_tokens(maps)
    assert tokens.shape == (1, 6, 85, 1)
    assert torch.equal(tokens[0, :, :, 0], torch.arange(6.0)[:, None].expand(6, 85))


def test_the_second_scale_lies_column_by_column() -> None:
    fine = torch.arange(4.0).reshape(1, 2, 2, 1)
    assert region_tokens([torch.zeros(1, 1, 1, 1), fine])[0, 0, :, 0].tolist() == [0, 0, 2, 1, 3]


def test_refuses_maps_that_do_not_double() -> None:
    with pytest.raises(
        ValueError, match=r"maps\[1\] has sides \(3, 4\); with maps\[0\] of \(2, 2\) they must be \(4, 4\)"
    ):
        region_tokens([torch.zeros(1, 2, 2, 1), torch.zeros(1, 3, 4, 1)])


def test_those_who_ask_alone_get_the_same(generator: torch.Generator) -> None:
    layer = GroupAttention(8, 2)
    x = torch.randn(2, 3, 5, 8, generator=generator)
    assert torch.allclose(layer(x, slice(0, 1)), layer(x)[:, :, :1], atol=1e-6)


def test_regions_do_not_see_each_other(generator: torch.Generator) -> None:
    layer = GroupAttention(8, 2)
    x, order = torch.randn(1, 6, 5, 8, generator=generator), torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-6)


def test_regions_reach_every_token(generator: torch.Generator) -> None:
    x = torch.randn(1, 6, 7, 8, generator=generator, requires_grad=True)
    PatchMixer(8, 2, 4)(x)[0, 0, 0].sum().backward()
    assert x.grad is not None and bool((x.grad.abs().sum(-1) > 0).all())
