from __future__ import annotations

import pytest
import torch
from torch import nn

from glocal.nn import blocks


def test_drop_path_keeps_the_mean_and_drops_samples(generator: torch.Generator) -> None:
    x = torch.ones(4000, 2, 3)
    y = blocks.drop_path(x, 0.25, generator)
    assert y.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert torch.equal(y.amax((1, 2)), y.amin((1, 2))) and abs(float(y.mean()) - 1) < 0.05
    assert torch.equal(blocks.drop_path(x, 0.25, torch.Generator().manual_seed(1)),
                       blocks.drop_path(x, 0.25, torch.Generator().manual_seed(1)))  # fmt: skip
    layer = blocks.DropPath(0.5)
    assert torch.equal(layer.eval()(x), x) and not torch.equal(layer.train()(x), x)
    with pytest.raises(ValueError, match=r"DropPath: rate=1 must lie in \[0, 1\)"):
        blocks.DropPath(1)


def test_drop_rates_rise_over_all_blocks() -> None:
    assert blocks.drop_rates(0.3, (1, 3)) == [[0.0], [pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.3)]]


def test_layer_scale() -> None:
    x = torch.randn(2, 3, 4)
    assert blocks.gamma(4, None) is None and blocks.scaled(x, None) is x
    assert torch.equal(blocks.scaled(x, blocks.gamma(4, 0.5)), x * 0.5)


def test_relative_index_is_query_minus_key() -> None:
    index = blocks.relative_index(2, 3)
    for q in range(6):
        for k in range(6):
            dy, dx = q // 3 - k // 3, q % 3 - k % 3
            assert index[q, k] == (dy + 1) * 5 + dx + 2
    table = torch.randn(15, 2)
    assert torch.equal(blocks.window_bias(table, index)[1, 4, 2], table[index[4, 2], 1])


def test_tables_resize_head_by_head() -> None:
    table = torch.randn(3, 13, 13)
    larger = blocks.resize_table(table, (21, 21))
    alone = nn.functional.interpolate(table[1][None, None], size=(21, 21), mode="bicubic", align_corners=False)
    assert larger.shape == (3, 21, 21) and torch.allclose(larger[1], alone[0, 0], atol=1e-6)
    flat = table.flatten(1).T
    assert torch.allclose(blocks.resize_flat_table(flat, 11), larger.flatten(1).T, atol=1e-6)
    assert blocks.resize_table(table, (13, 13)) is table
    with pytest.raises(ValueError, match="table of 12 rows is not square; nearest: 9"):
        blocks.resize_flat_table(torch.zeros(12, 2), 3)


def test_merging_order_of_swin() -> None:
    merge = blocks.PatchMerge(1, 4)
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    x = torch.arange(6.0).reshape(1, 2, 3, 1)  # padded to 2 x 4
    assert torch.equal(merge(x)[0, 0], torch.tensor([[0.0, 3, 1, 4], [2, 5, 0, 0]]))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 3)])
@pytest.mark.parametrize(
    "make",
    [blocks.StridedConvMerge, blocks.PatchMerge, blocks.NormConvMerge, lambda a, b: blocks.NormConvMerge(a, b, True)],
)
def test_mergings_halve_upwards(make, size: tuple[int, int]) -> None:
    assert make(4, 6)(torch.randn(2, *size, 4)).shape == (2, -(-size[0] // 2), -(-size[1] // 2), 6)


@pytest.mark.parametrize("size", [(16, 16), (13, 18), (1, 5)])
def test_embeddings_quarter_upwards(size: tuple[int, int]) -> None:
    for embed in (blocks.PatchEmbed(3, 6), blocks.PatchEmbed(3, 6, kernel=7), blocks.StridedConvEmbed(3, 6)):
        assert embed(torch.randn(2, 3, *size)).shape == (2, -(-size[0] // 4), -(-size[1] // 4), 6)


def test_maps_are_channels_last_views() -> None:
    x = torch.randn(2, 5, 6, 4)
    assert blocks.to_nchw(x).is_contiguous(memory_format=torch.channels_last)
    assert blocks.to_nhwc(blocks.to_nchw(x)).data_ptr() == x.data_ptr()
    norm = blocks.LayerNorm2d(4)
    assert torch.allclose(norm(blocks.to_nchw(x)), blocks.to_nchw(nn.functional.layer_norm(x, (4,))), atol=1e-6)
    assert blocks.pad_multiple(x, (4, 3)).shape == (2, 8, 6, 4) and blocks.pad_multiple(x, 1) is x


def test_feed_forward_and_gates() -> None:
    x = torch.randn(2, 5, 6, 4)
    for layer in (blocks.Mlp(4, 8), blocks.ConvMlp(4, 8), blocks.ConvMlp(4, 8, residual=True), blocks.ConvPosition(4),
                  blocks.SqueezeExcite(4, 2)):  # fmt: skip
        assert layer(x).shape == x.shape
    gate = blocks.SqueezeExcite(4, 2)
    for parameter in gate.fc2.parameters():
        nn.init.zeros_(parameter)
    assert torch.allclose(gate(x), x / 2)
    with pytest.raises(ValueError, match="kernel=4 must be odd, for example 5"):
        blocks.ConvPosition(4, 4)


def test_linears_start_small() -> None:
    layer = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(1, 1, 1))
    before = layer[1].weight.clone()  # type: ignore[union-attr]
    blocks.init_linears(layer)
    assert 0.015 < float(layer[0].weight.detach().std()) < 0.025 and not layer[0].bias.any()  # type: ignore[union-attr]
    assert torch.equal(layer[1].weight, before)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gelu_of_tanh_joins_the_product_on_a_gpu() -> None:
    from glocal.nn.blocks.mbconv import tanh_gelu

    torch.manual_seed(0)
    layer = blocks.Mlp(64, 256, tanh_gelu).cuda()
    x = torch.randn(2, 5, 7, 64, device="cuda")
    wanted = layer(x)
    with torch.no_grad():
        found = layer(x)
    assert torch.allclose(found, wanted, atol=1e-5)
