from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn.inline import InLineAttention, InLineBranch, InLineSpec
from glocal.nn.stripe_attention import StripeBranch
from glocal.ops.dynamic_conv import dynamic_conv
from glocal.testing.layer_tester import LayerTester


class TestWhole(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 1, 8))

    def make(self) -> InLineAttention:
        return InLineAttention(8, 2)

    def bad(self):
        return [
            (lambda: InLineAttention(8, 3), "heads=3 must divide dim=8"),
            (lambda: InLineAttention(8, 2, 4, 4), "shift=4 must lie in [0, window=4); usual: 2"),
            (lambda: InLineSpec("softmax"), "feature='softmax'; legal: 'identity', 'relu'"),
            (lambda: InLineSpec(normaliser="sum"), "normaliser='sum'; legal: 'subtract', 'ratio'"),  # type: ignore[arg-type]
        ]


class TestRolled(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 5, 5, 8))

    def make(self) -> InLineAttention:
        return InLineAttention(8, 2, window=4, shift=1, spec=InLineSpec("exp", split_kv=True))


class TestMasked(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 5, 5, 8))

    def make(self) -> InLineAttention:
        return InLineAttention(8, 2, window=4, shift=1, spec=InLineSpec("relu", mask=True))


class TestBaseline(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 1, 8))

    def make(self) -> InLineAttention:
        return InLineAttention(8, 2, spec=InLineSpec("elu", "ratio", local=False))


class _Alone(nn.Module):
    """A branch as a layer of its own."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.qkv, self.branch = nn.Linear(8, 24), branch

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        return self.branch(*self.qkv(x).chunk(3, -1), x.mean((1, 2)))


@pytest.mark.parametrize("stripe", ["columns", "rows", "whole"])
class TestStripes(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 4, 8))
    stripe = "columns"

    @pytest.fixture(autouse=True)
    def _which(self, stripe) -> None:
        self.stripe = stripe

    def make(self) -> nn.Module:
        return _Alone(StripeBranch(8, 2, self.stripe, 2))  # type: ignore[arg-type]


class TestBranch(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 4, 8))

    def make(self) -> nn.Module:
        return _Alone(InLineBranch(8, 2))


def test_a_constant_added_to_values_passes_through(generator: torch.Generator) -> None:
    layer = InLineAttention(8, 2, spec=InLineSpec(local=False)).double()
    x = torch.randn(1, 5, 6, 8, generator=generator, dtype=torch.float64)
    before, shift = layer(x), torch.randn(8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layer.qkv.bias[16:] += shift
    assert torch.allclose(layer(x) - before, F.linear(shift, layer.proj.weight).expand_as(before))


def test_masked_windows_do_not_mix_borders(generator: torch.Generator) -> None:
    layer = InLineAttention(8, 2, window=4, shift=2, spec=InLineSpec(mask=True))
    x = torch.randn(1, 8, 8, 8, generator=generator)
    other = x.clone()
    other[:, 6:] += 1  # the last rows meet the first ones in rolled windows only
    assert torch.equal(layer(x)[:, :2], layer(other)[:, :2])
    layer.spec = InLineSpec()
    assert not torch.allclose(layer(x)[:, :2], layer(other)[:, :2], atol=1e-3)
    assert torch.allclose(layer(x)[:, 2:6, 2:6], layer.proj(layer._inside(x[:, 2:6, 2:6], (4, 4))), atol=1e-5)


def test_dynamic_conv_equals_grouped_convolution(generator: torch.Generator) -> None:
    x, kernels = torch.randn(2, 5, 6, 4, generator=generator), torch.randn(2, 4, 3, 5, generator=generator)
    folded = x.permute(0, 3, 1, 2).reshape(1, 8, 5, 6)
    wanted = F.conv2d(folded, kernels.reshape(8, 1, 3, 5), padding=(1, 2), groups=8)
    assert torch.allclose(dynamic_conv(x, kernels), wanted.reshape(2, 4, 5, 6).permute(0, 2, 3, 1), atol=1e-5)


def test_dynamic_conv_refuses_in_words() -> None:
    x = torch.zeros(2, 5, 6, 4)
    with pytest.raises(ValueError, match=r"must be \[2 samples, 4 channels, h, w\]"):
        dynamic_conv(x, torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="kernels of 2 x 3 must have odd sides"):
        dynamic_conv(x, torch.zeros(2, 4, 2, 3))


def test_stripes_are_windows_of_full_length(generator: torch.Generator) -> None:
    branch = StripeBranch(4, 1, "rows", 2)
    q, k, v = (torch.randn(1, 4, 3, 4, generator=generator) for _ in range(3))
    out = branch(q, k, v, v.mean((1, 2)))
    for half in (slice(0, 2), slice(2, 4)):
        a, b, c = (t[:, half].flatten(1, 2) for t in (q, k, v))
        dense = F.scaled_dot_product_attention(a, b, c).unflatten(1, (2, 3))
        local = branch.get_v(v[:, half].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert torch.allclose(out[:, half], dense + local, atol=1e-5)
