from __future__ import annotations

from typing import Literal

import pytest
import torch

from glocal.nn.blocks.mbconv import MBConv, SameConv2d, Shortcut
from glocal.nn.maxvit import AxisAttention
from glocal.nn.window_attention import WindowSpec
from glocal.testing._common import refused
from glocal.testing.layer_tester import LayerTester


class TestWindows(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 3, 8))

    def make(self) -> AxisAttention:
        return AxisAttention(8, 2, "window", 3)

    def bad(self):
        return [
            (lambda: AxisAttention(8, 2, "axis"), "groups='axis'; legal: 'window', 'grid'"),  # type: ignore[arg-type]
            (lambda: AxisAttention(8, 3), "heads=3 must divide dim=8"),
        ]


class TestGrid(LayerTester):
    shapes = ((2, 7, 8, 8), (1, 2, 2, 8))

    def make(self) -> AxisAttention:
        return AxisAttention(8, 2, "grid", 3, trained=2, shared_bias=True)


def test_a_group_of_the_whole_map_is_dense(generator: torch.Generator) -> None:
    window, grid = AxisAttention(8, 2, "window", 4), AxisAttention(8, 2, "grid", 4)
    grid.load_state_dict(window.state_dict())
    x = torch.randn(2, 4, 4, 8, generator=generator)
    q, k, v = window.qkv(x.flatten(1, 2)).reshape(2, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / 2 + window.rel_pos()).softmax(-1)
    dense = window.proj((weights @ v).transpose(1, 2).reshape(2, 4, 4, 8))
    assert torch.allclose(window(x), dense, atol=1e-6) and torch.allclose(grid(x), dense, atol=1e-6)


def test_a_grid_is_a_window_of_the_reordered_map(generator: torch.Generator) -> None:
    window, grid = AxisAttention(8, 2, "window", 2), AxisAttention(8, 2, "grid", 2)
    grid.load_state_dict(window.state_dict())
    x = torch.randn(1, 6, 8, 8, generator=generator)
    rows, columns = (torch.arange(n).reshape(2, n // 2).T.flatten() for n in (6, 8))  # i n / 2 + a at place 2 a + i
    moved = window(x[:, rows][:, :, columns])
    assert torch.allclose(grid(x)[:, rows][:, :, columns], moved, atol=1e-6)


def test_the_bias_is_looked_up_by_key_minus_query(generator: torch.Generator) -> None:
    table = AxisAttention(8, 2, "window", 3).rel_pos
    torch.nn.init.normal_(table.relative_position_bias_table, generator=generator)
    bias = table().reshape(2, 3, 3, 3, 3)
    assert torch.equal(bias[1, 0, 2, 1, 0], table.relative_position_bias_table[1, 1 - 0 + 2, 0 - 2 + 2])


@pytest.mark.parametrize("groups", ["window", "grid"])
def test_padding_is_hidden(groups, generator: torch.Generator) -> None:
    """On a map of 4 x 5, padded to 6 x 6, the last group is attention over its real tokens alone."""
    layer = AxisAttention(8, 2, groups, 3)
    torch.nn.init.normal_(layer.qkv.bias, std=3.0, generator=generator)
    x = torch.randn(1, 4, 5, 8, generator=generator)
    home = torch.arange(20).reshape(1, 4, 5, 1) + 1
    places = layer.cut(torch.nn.functional.pad(home, (0, 0, 0, 1, 0, 2)))[0, -1, :, 0]
    real = places > 0
    tokens = x.flatten(0, 2)[places[real] - 1]
    q, k, v = layer.qkv(tokens).reshape(-1, 3, 2, 4).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(-1, -2) / 2 + layer.rel_pos()[:, real][:, :, real]).softmax(-1)
    alone = layer.proj((weights @ v).transpose(0, 1).reshape(-1, 8))
    assert 0 < len(tokens) < 9 and torch.allclose(layer(x).flatten(0, 2)[places[real] - 1], alone, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 6), (9, 7), (1, 2)])
def test_same_padding(size: tuple[int, int]) -> None:
    layer = SameConv2d(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(layer.weight)
    y = layer(torch.ones(1, 1, *size))
    assert y.shape[2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    assert float(y[0, 0, 0, 0].detach()) == {(8, 6): 9, (9, 7): 4, (1, 2): 2}[size]  # even sizes: no padding above


def test_the_mean_of_a_border_cell_counts_its_pixels() -> None:
    x = torch.arange(9.0).reshape(1, 3, 3, 1)
    assert Shortcut(1, 1, 2)(x)[0, :, :, 0].tolist() == [[2, 3.5], [6.5, 8]]


def test_blocks_refuse_in_words() -> None:
    refused([(lambda: MBConv(8, 8, 3), "stride=3; legal: 1, 2"), (lambda: MBConv(8, 3), "out=3 must be at least 4")])


@pytest.mark.parametrize("groups", ["window", "grid"])
def test_a_pattern_on_the_whole_map_gives_the_same(groups: Literal["window", "grid"]) -> None:
    cut = AxisAttention(16, 2, groups, 3)
    whole = AxisAttention(16, 2, groups, 3, spec=WindowSpec(backend="auto"))
    torch.nn.init.normal_(cut.rel_pos.relative_position_bias_table)
    whole.load_state_dict(cut.state_dict(), strict=True)
    x = torch.randn(2, 6, 9, 16)
    torch.testing.assert_close(whole(x), cut(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"backend='auto' on a map of \(7, 9\), which 3 does not divide; legal: \(9, 9\)"
    ):
        whole(x.new_zeros(1, 7, 9, 16))
