"""Window-first orders."""

from __future__ import annotations

from math import prod

import pytest
import torch

from glocal.canvas.curves import hilbert
from glocal.canvas.window_first import Inside, inverse, turned_squares, window_first

# Places of a window of 4 x 4 and the first window of 8 x 8, as the authors' code numbers them.
PUBLISHED_4 = [[0, 3, 8, 10], [2, 1, 11, 9], [13, 14, 4, 6], [15, 12, 7, 5]]


@pytest.mark.parametrize("inside", ["raster", "quarters", "hilbert"])
def test_windows_follow_each_other_and_every_token_comes_once(inside: Inside) -> None:
    order = window_first((8, 24), (4, 8), inside)
    assert torch.equal(order.sort().values, torch.arange(8 * 24))
    assert torch.equal(order[inverse(order)], torch.arange(8 * 24))
    window = order // 24 // 4 * 3 + order % 24 // 8
    assert torch.equal(window, torch.arange(6).repeat_interleave(32))


def test_quarters_are_windows_in_windows() -> None:
    order = window_first((8, 8), (8, 8), "quarters")
    assert order[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]


def test_the_published_curve_jumps_where_the_real_one_does_not() -> None:
    assert turned_squares((4, 4)).reshape(4, 4).tolist() == PUBLISHED_4

    def longest_step(order: torch.Tensor) -> int:
        row, column = order // 8, order % 8
        return int(((row[1:] - row[:-1]).abs() + (column[1:] - column[:-1]).abs()).max())

    assert longest_step(hilbert((8, 8))) == 1
    assert longest_step(window_first((8, 8), (8, 8), "hilbert")) > 1


@pytest.mark.parametrize("shape", [(3, 3), (2, 7), (5, 4)])
def test_places_of_any_window_are_different(shape: tuple[int, int]) -> None:
    assert turned_squares(shape).unique().numel() == prod(shape)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"window=\(4, 4\) does not divide shape=\(6, 8\); nearest window of 6 tokens: 3"
    ):
        window_first((6, 8), (4, 4))
    with pytest.raises(ValueError, match=r"'quarters' needs a window of multiples of 4; window=\(2, 4\)"):
        window_first((8, 8), (2, 4), "quarters")
    with pytest.raises(ValueError, match="inside='spiral'; legal: 'raster', 'quarters', 'hilbert'"):
        window_first((8, 8), (4, 4), "spiral")  # type: ignore[arg-type]
