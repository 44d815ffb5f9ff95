from __future__ import annotations

import pytest
import torch

from glocal.nn.channel_attention import ChannelAttention
from glocal.ops.channel import gram
from glocal.testing.layer_tester import LayerTester


class TestReleased(LayerTester):
    shapes = ((2, 7, 9, 16), (1, 3, 1, 16))

    def make(self) -> ChannelAttention:
        return ChannelAttention(16, 2)

    def bad(self):
        return [(lambda: ChannelAttention(16, 2, "v3"), "form='v3'; legal: 'v1', 'v2'")]  # type: ignore[arg-type]


class TestSecond(LayerTester):
    shapes = ((2, 7, 9, 16), (1, 3, 1, 16))

    def make(self) -> ChannelAttention:
        return ChannelAttention(16, 2, "v2")


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_second_form_by_definition(dynamic: bool, generator: torch.Generator) -> None:
    layer, x = ChannelAttention(6, 2, "v2", dynamic_scale=dynamic), torch.randn(1, 5, 7, 6, generator=generator)
    q, k, v = layer.qkv(x.flatten(1, 2)[0]).unflatten(1, (3, 2, 3)).permute(1, 2, 0, 3)  # [2, 35, 3] each
    weights = (q.mT @ k * (35 if dynamic else 3) ** -0.5).softmax(-1)
    out = layer.proj((weights @ v.mT).permute(2, 0, 1).flatten(1)).reshape(x.shape)
    torch.testing.assert_close(layer(x), out)
    with pytest.raises(ValueError, match="dynamic_scale=False with form='v1'"):
        ChannelAttention(6, 2, "v1", dynamic_scale=False)


def test_token_order_does_not_matter(generator: torch.Generator) -> None:
    layer, x = ChannelAttention(8, 2), torch.randn(1, 4, 5, 8, generator=generator)
    order = torch.randperm(20, generator=generator)
    assert torch.allclose(layer(x.flatten(1, 2)[:, order]), layer(x).flatten(1, 2)[:, order], atol=1e-5)


@pytest.mark.parametrize("activation", ["softmax", "softmin", "relu", "signed_root"])
@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_gram_equals_its_definition(activation, normalise, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 11, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    scale = torch.tensor([0.3, 0.7], dtype=torch.float64)
    out = gram(q, k, v, 2, scale=scale, normalise=normalise, activation=activation)
    for b in range(2):
        for g in range(2):
            c = slice(3 * g, 3 * g + 3)
            a, d = q[b, :, c], k[b, :, c]
            if normalise == "l2":
                a, d = a / a.norm(dim=0), d / d.norm(dim=0)
            x = scale[g] * a.T @ d
            w = {"softmax": x.softmax(-1), "softmin": (-x).softmax(-1), "relu": x.relu(),
                 "signed_root": x.sign() * x.abs().sqrt()}[activation]  # fmt: skip
            assert torch.allclose(out[b, :, c], v[b, :, c] @ w.T)


def test_gram_takes_other_widths_for_q(generator: torch.Generator) -> None:
    q, k = torch.randn(1, 5, 4, generator=generator), torch.randn(1, 5, 8, generator=generator)
    assert gram(q, k, k, 2).shape == (1, 5, 4)


def test_gram_sums_in_float32(generator: torch.Generator) -> None:
    q = torch.randn(1, 4096, 32, generator=generator)
    exact = gram(q.double(), q.double(), q.double(), scale=4096**-0.5)
    low = gram(q.bfloat16(), q.bfloat16(), q.bfloat16(), scale=4096**-0.5)
    assert low.dtype == torch.bfloat16 and float((low.double() - exact).abs().max()) < 0.1


def test_gram_refuses_in_words() -> None:
    x = torch.zeros(2, 5, 6)
    with pytest.raises(ValueError, match="groups=4 must divide the 6 channels of q"):
        gram(x, x, x, 4)
    with pytest.raises(ValueError, match="k has 6 channels, v has 4; they must agree"):
        gram(x, x, x[..., :4], 2)
    with pytest.raises(ValueError, match=r"k of shape \(2, 4, 6\) must be \[batch, tokens, channels\]"):
        gram(x, x[:, :4], x)
    with pytest.raises(ValueError, match="activation='tanh'; legal: 'softmax', 'softmin', 'relu', 'signed_root'"):
        gram(x, x, x, activation="tanh")  # type: ignore[arg-type]
