from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glocal.nn.blocks.deformable import DeformableConv, DeformableMerge
from glocal.nn.blocks.windows import to_windows
from glocal.nn.hilo import HiLo
from glocal.testing._common import refused
from glocal.testing.layer_tester import LayerTester


class TestBoth(LayerTester):
    shapes = ((2, 5, 7, 12), (1, 2, 2, 12))

    def make(self) -> HiLo:
        return HiLo(12, 3, 2, alpha=0.5)

    def bad(self):
        return [
            (lambda: HiLo(12, 5), "heads=5 must divide dim=12; nearest number of heads that does: 4"),
            (lambda: HiLo(12, 3, 0), "window=0 must be at least 1"),
            (lambda: HiLo(12, 3, alpha=1.5), "alpha=1.5 must lie in [0, 1]; published models have 0.9"),
        ]


class TestDense(LayerTester):
    shapes = ((2, 4, 5, 8), (1, 2, 2, 8))

    def make(self) -> HiLo:
        return HiLo(8, 2, 1)


@pytest.mark.parametrize(("heads", "window", "alpha", "low"), [(12, 2, 0.9, 10), (16, 2, 0.9, 14), (4, 1, 0.0, 4),
                                                             (4, 3, 0.0, 0), (4, 3, 1.0, 4)])  # fmt: skip
def test_heads_are_split_downwards(heads: int, window: int, alpha: float, low: int) -> None:
    layer = HiLo(4 * heads, heads, window, alpha)
    assert (layer.low_heads, layer.high_heads) == (low, heads - low)


def test_windows_of_one_are_dense_attention(generator: torch.Generator) -> None:
    layer, x = HiLo(8, 2, 1), torch.randn(2, 3, 4, 8, generator=generator)
    tokens = x.flatten(1, 2)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (layer.l_q(tokens), *layer.l_kv(tokens).chunk(2, -1)))
    out = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    assert torch.allclose(layer(x).flatten(1, 2), layer.l_proj(out.transpose(1, 2).flatten(2)), atol=1e-6)


def test_high_heads_stay_in_their_window(generator: torch.Generator) -> None:
    layer = HiLo(8, 2, 2, alpha=0.0)
    x = torch.randn(1, 4, 6, 8, generator=generator).requires_grad_()
    layer(x)[0, 0, 2].sum().backward()
    assert x.grad is not None
    reached = to_windows(x.grad.abs().sum(-1, keepdim=True), (2, 2))[0, :, :, 0].sum(-1) > 0
    assert reached.tolist() == [False, True, False, False, False, False]


def test_one_mean_is_the_same_for_all(generator: torch.Generator) -> None:
    y = HiLo(8, 2, 4, alpha=1.0)(torch.randn(1, 4, 4, 8, generator=generator)).flatten(0, 2)
    assert torch.allclose(y, y[:1].expand_as(y), atol=1e-6)


def test_multiply_adds_are_the_published_ones() -> None:
    layer, counter = HiLo(384, 12, 2, 0.5, qkv_bias=False).to("meta"), FlopCounterMode(display=False)
    with counter:
        layer(torch.empty(1, 14, 14, 384, device="meta"))
    assert counter.get_total_flops() // 2 == 83_467_776


def test_without_offsets_it_is_a_convolution(generator: torch.Generator) -> None:
    layer = DeformableConv(3, 5)
    x = torch.randn(2, 3, 7, 6, generator=generator)
    plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias, stride=2)
    assert torch.allclose(layer(x), plain, atol=1e-5)


def test_offsets_move_the_taps() -> None:
    """One down and half a pixel right; beyond the map is zero."""
    layer = DeformableConv(1, 1)
    torch.nn.init.zeros_(layer.weight)
    layer.weight.data[0, 0, 1, 0] = 1.0  # the tap of the second row, first column
    assert layer.bias is not None and layer.conv_offset.bias is not None
    layer.bias.data.zero_()
    layer.conv_offset.bias.data[4:6] = torch.tensor([1.0, 0.5])
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.allclose(layer(x), torch.tensor([[[[8.5, 10.5], [0, 0]]]]), atol=1e-5)


def test_a_map_without_patches_is_refused() -> None:
    refused([(lambda: DeformableMerge(4, 8)(torch.zeros(1, 1, 5, 4)), "a map of 1 x 5 has no 2 x 2 patch")])
