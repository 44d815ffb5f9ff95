from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from glocal.nn import blocks
from glocal.nn.blocks.windows import from_grid, from_windows, rolled_visible, to_grid, to_windows
from glocal.nn.window_attention import WindowAttention, WindowSpec
from glocal.testing.layer_tester import LayerTester


class TestPlain(LayerTester):
    shapes = ((2, 7, 9, 16), (1, 3, 3, 16))

    def make(self) -> WindowAttention:
        return WindowAttention(16, 2, 3)

    def bad(self):
        return [
            (lambda: WindowAttention(16, 3, 3), "heads=3 must divide dim=16; nearest number of heads that does: 2"),
            (lambda: WindowAttention(16, 2, 4, shift=4), "shift=4 must lie in [0, window=4); usual: 2"),
        ]


class TestRolled(LayerTester):
    shapes = ((2, 7, 9, 16), (1, 4, 4, 16))

    def make(self) -> WindowAttention:
        return WindowAttention(16, 2, 4, shift=2, relative_bias=True)


def test_a_bias_where_rolled_tokens_meet_has_no_pattern() -> None:
    x = torch.randn(1, 8, 8, 16)
    for mask, bias in ((True, True), (False, False)):
        own = WindowAttention(16, 2, 4, 2, bias, WindowSpec(mask=mask))
        named = WindowAttention(16, 2, 4, 2, bias, WindowSpec(mask=mask, backend="reference"))
        named.load_state_dict(own.state_dict())
        assert own.whole((8, 8), (8, 8))
        torch.testing.assert_close(named(x), own(x))
    assert not WindowAttention(16, 2, 4, 2, True, WindowSpec(mask=False)).whole((8, 8), (8, 8))
    with pytest.raises(ValueError, match="shift=2, mask=False and a relative bias; legal: backend=None, or mask=True"):
        WindowAttention(16, 2, 4, 2, True, WindowSpec(mask=False, backend="reference"))(x)


def test_windows_and_grids_come_back() -> None:
    x = torch.arange(2 * 6 * 8 * 1.0).reshape(2, 6, 8, 1)
    windows, grid = to_windows(x, (3, 2)), to_grid(x, (3, 2))
    assert windows.shape == (2, 8, 6, 1) and grid.shape == (2, 8, 6, 1)
    assert windows[0, 1, :, 0].tolist() == [2, 3, 10, 11, 18, 19]
    assert grid[0, 1, :, 0].tolist() == [1, 5, 17, 21, 33, 37]  # rows 0, 2, 4 and columns 1, 5
    assert torch.equal(from_windows(windows, (6, 8), (3, 2)), x) and torch.equal(from_grid(grid, (6, 8), (3, 2)), x)
    with pytest.raises(
        ValueError, match=r"to_windows: sides \(4, 4\) do not divide the map \(6, 8\); pad it to \(8, 8\)"
    ):
        to_windows(x, (4, 4))


def test_rolled_windows_see_their_own_side() -> None:
    seen = rolled_visible((4, 4), (2, 2), (1, 1))
    home = torch.arange(16.0).reshape(1, 4, 4, 1).roll((-1, -1), (1, 2))
    tokens = to_windows(home, (2, 2))[0, :, :, 0].long()
    for window in range(4):
        for q in range(4):
            for k in range(4):
                a, b = int(tokens[window, q]), int(tokens[window, k])
                near = abs(a // 4 - b // 4) <= 1 and abs(a % 4 - b % 4) <= 1
                assert bool(seen[window, q, k]) == near


def test_padding_is_a_visible_key() -> None:
    """One token in a window of 2 x 2: three keys carry the bias of the projection."""
    layer = WindowAttention(4, 1, 2)
    torch.nn.init.normal_(layer.qkv.bias)
    x = torch.randn(1, 1, 1, 4)
    q, k, v = layer.qkv(torch.cat((x.reshape(1, 4), torch.zeros(3, 4)))).chunk(3, -1)
    out = ((q[:1] @ k.T * 0.5).softmax(-1) @ v) @ layer.proj.weight.T + layer.proj.bias
    assert torch.allclose(layer(x).reshape(1, 4), out, atol=1e-6)


def test_bias_is_looked_up_by_query_minus_key() -> None:
    layer = WindowAttention(4, 2, 2, relative_bias=True, spec=WindowSpec(scale=0.0))
    assert layer.relative_position_bias_table is not None
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(1, 2, 2, 4)
    weights = blocks.window_bias(layer.relative_position_bias_table, blocks.relative_index(2, 2)).softmax(-1)
    v = layer.qkv(x)[..., 8:].reshape(4, 2, 2).transpose(0, 1)
    assert torch.allclose(layer(x).reshape(4, 4), layer.proj((weights @ v).transpose(0, 1).reshape(4, 4)), atol=1e-6)


def test_dropout_acts_in_training_alone(generator: Callable) -> None:
    layer = WindowAttention(4, 1, 2, spec=WindowSpec(attn_drop=0.5, proj_drop=0.5))
    x = torch.randn(1, 4, 4, 4)
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(("shift", "mask", "bias"), [(0, True, True), (2, True, True), (1, False, False)])
def test_a_pattern_on_the_whole_map_gives_the_same(shift: int, mask: bool, bias: bool) -> None:
    """Maps are padded alike; gradients of inputs and weights agree too."""
    spec = WindowSpec(mask=mask)
    cut = WindowAttention(16, 2, 4, shift, bias, spec)
    whole = WindowAttention(16, 2, 4, shift, bias, replace(spec, backend="auto"))
    if cut.relative_position_bias_table is not None:
        torch.nn.init.normal_(cut.relative_position_bias_table)
    whole.load_state_dict(cut.state_dict(), strict=True)
    x = torch.randn(2, 7, 9, 16)
    found = []
    for layer in (cut, whole):
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        out = layer(inputs[0])
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
