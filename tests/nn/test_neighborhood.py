from __future__ import annotations

import pytest
import torch

from glocal.nn import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d, NeighborhoodSpec
from glocal.testing import LayerTester, dense_attention, oracle

PAD = NeighborhoodSpec(small_maps="pad")


class TestSequence(LayerTester):
    shapes = ((2, 19, 8), (1, 6, 8))

    def make(self) -> torch.nn.Module:
        return NeighborhoodAttention1d(8, 2, 3, stride=2, dilation=2, causal=True)


class TestMap(LayerTester):
    shapes = ((2, 7, 10, 8), (1, 3, 5, 8))

    def make(self) -> torch.nn.Module:
        return NeighborhoodAttention2d(8, 2, (3, 4), (2, 1), causal=(False, True), spec=NeighborhoodSpec(scale=0.2))

    def bad(self):
        x = torch.zeros(1, 7, 10, 8)
        return [
            (
                lambda: NeighborhoodAttention2d(8, 3, 3),
                "heads=3 must divide dim=8; nearest number of heads that does: 2",
            ),
            (
                lambda: NeighborhoodAttention2d(8, 2, (3, 3, 3)),
                "window=(3, 3, 3) has 3 entries, but the grid has 2 axes",
            ),
            (lambda: NeighborhoodAttention2d(8, 2, 3, 4), "stride=4 on axis 0 must lie between 1 and the window 3"),
            (
                lambda: NeighborhoodAttention2d(8, 2, 3, causal=True, relative_bias=True),
                "relative_bias=True with causal=True; published layers have one or the other",
            ),
            (lambda: NeighborhoodSpec(small_maps="crop"), "small_maps='crop'; legal: 'error', 'pad'"),  # type: ignore[arg-type]
            (lambda: NeighborhoodSpec(attn_drop=1.0), "attn_drop=1.0 must lie in [0, 1)"),
            (lambda: self.make()(x[0]), "x of shape (7, 10, 8) must be [batch, 2 map axes, 8]"),
            (lambda: self.make()(x[..., :4]), "x of shape (1, 7, 10, 4) must be [batch, 2 map axes, 8]"),
            (lambda: NeighborhoodAttention2d(8, 2, 9)(x), "window=9 with dilation=1 does not fit axis 0 of length 7"),
        ]


class TestMapWithBias(LayerTester):
    shapes = ((2, 9, 11, 8), (1, 4, 7, 8), (1, 1, 1, 8))

    def make(self) -> torch.nn.Module:
        return NeighborhoodAttention2d(8, 2, 3, dilation=2, relative_bias=True, spec=PAD)


class TestVideo(LayerTester):
    shapes = ((2, 4, 5, 6, 8), (1, 2, 3, 4, 8))

    def make(self) -> torch.nn.Module:
        spec = NeighborhoodSpec(qkv_bias=False)
        return NeighborhoodAttention3d(8, 2, (2, 3, 4), (1, 3, 2), causal=(True, False, False), spec=spec)


class TestVideoWithBias(LayerTester):
    shapes = ((1, 3, 7, 6, 8), (1, 3, 3, 3, 8))
    gradcheck = False

    def make(self) -> torch.nn.Module:
        return NeighborhoodAttention3d(8, 2, 3, dilation=(1, 2, 1), relative_bias=True, spec=PAD)


def test_state_keys_are_the_published_ones() -> None:
    assert set(NeighborhoodAttention2d(8, 2, 3).state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    biased = NeighborhoodAttention2d(8, 2, (3, 5), relative_bias=True, spec=NeighborhoodSpec(qkv_bias=False))
    assert set(biased.state_dict()) == {"rpb", "qkv.weight", "proj.weight", "proj.bias"}
    assert biased.rpb is not None and biased.rpb.shape == (2, 5, 9)


def test_padded_tokens_are_keys_that_carry_the_bias_of_qkv(generator: torch.Generator) -> None:
    layer = NeighborhoodAttention2d(8, 2, 3, dilation=2, relative_bias=True, spec=PAD).double()
    x = torch.randn(1, 4, 7, 8, generator=generator, dtype=torch.float64)
    q, k, v = layer.qkv(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 2))).reshape(1, 42, 3, 2, 4).permute(2, 0, 3, 1, 4)
    seen = oracle.axiswise((6, 7), [oracle.neighborhood(n, 3, dilation=2) for n in (6, 7)])
    assert layer.rpb is not None
    bias = torch.zeros(2, 42, 42, dtype=torch.float64)
    for i, j in seen.nonzero().tolist():
        bias[:, i, j] = layer.rpb[:, (j // 7) // 2 - (i // 7) // 2 + 2, (j % 7) // 2 - (i % 7) // 2 + 2]
    out = dense_attention(q, k, v, seen, bias=bias).out.transpose(1, 2).reshape(1, 6, 7, 8)[:, :4]
    torch.testing.assert_close(layer(x), layer.proj(out))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_learns_after_inference(backend: str, generator: torch.Generator) -> None:
    layer = NeighborhoodAttention2d(8, 2, 3, relative_bias=True, spec=NeighborhoodSpec(backend=backend))
    x = torch.randn(1, 6, 13, 8, generator=generator)  # a size that no other test has left in a cache
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.rpb is not None and layer.rpb.grad is not None


def test_macs_count_visible_pairs() -> None:
    layer = NeighborhoodAttention2d(8, 2, 3, dilation=2, spec=PAD)
    pairs = 42 * 9  # 4 x 7 is padded to 6 x 7
    assert layer.macs(torch.zeros(2, 4, 7, 8)) == 2 * (42 * 3 * 64 + pairs * 2 * 8 + 28 * 64)
    causal = NeighborhoodAttention1d(8, 2, 3, causal=True)
    assert causal.macs(torch.zeros(1, 5, 8)) == 5 * 4 * 64 + (1 + 2 + 3 + 3 + 3) * 2 * 8


def test_dropout_acts_in_training_alone(generator: torch.Generator) -> None:
    layer = NeighborhoodAttention1d(8, 2, 5, spec=NeighborhoodSpec(attn_drop=0.5))
    x = torch.randn(2, 9, 8, generator=generator)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_two_windows_in_one_compiled_model(generator: torch.Generator) -> None:
    model = torch.nn.Sequential(
        NeighborhoodAttention2d(8, 2, 3, relative_bias=True), NeighborhoodAttention2d(8, 2, 5, relative_bias=True)
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((2, 6, 7, 8), (3, 6, 7, 8), (2, 9, 5, 8)):
        x = torch.randn(size, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("kind", [NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d])
def test_prints_its_settings(kind: type) -> None:
    assert "dim=8, heads=2, window=3, stride=1, dilation=1, causal=False, small_maps='error'" in str(kind(8, 2, 3))
