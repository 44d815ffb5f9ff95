"""Overlapping tiles and their blend."""

from __future__ import annotations

import pytest
import torch

from glocal.ops.tiles import Tile, blend, raised_cosine, tiles

CASES = [
    ((16, 24), (8, 8), (4, 4)),
    ((17, 9), (8, 4), (5, 3)),
    ((6, 6), (8, 8), (4, 4)),
    ((40, 8), (8, 8), (8, 8)),
    ((1, 3), (1, 2), (1, 1)),
]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("size", "window", "stride"), CASES)
def test_the_blend_of_the_parts_of_a_map_is_the_map(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], moved: bool, generator: torch.Generator
) -> None:
    x = torch.randn(2, 3, *size, generator=generator)
    for _ in range(10 if moved else 1):
        places = tiles(size, window, stride, generator if moved else None)
        torch.testing.assert_close(blend([p.of(x) for p in places], places, size), x, rtol=0, atol=1e-6)
        assert all(p.top >= 0 and p.top + p.height <= size[0] and p.left + p.width <= size[1] for p in places)


def test_tiles_are_evenly_spread_and_move_inside_only(generator: torch.Generator) -> None:
    assert [p.left for p in tiles((8, 16), (8, 8), (4, 4))] == [0, 4, 8]
    found = {tuple(p.left for p in tiles((8, 16), (8, 8), (4, 4), generator)) for _ in range(40)}
    assert len(found) > 1 and {f[0] for f in found} == {0} and {f[2] for f in found} == {8}


def test_weights_peak_in_the_middle() -> None:
    weight = raised_cosine(4, 6)
    assert float(weight.min()) > 0 and float(weight.max()) == pytest.approx(float(weight[2, 3]))
    torch.testing.assert_close(weight, weight.flip(0, 1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="stride=9 leaves gaps between tiles of 8; legal: up to 8"):
        tiles((20, 20), (8, 8), (9, 4))
    with pytest.raises(ValueError, match=r"window=\(0, 8\) must be at least 1"):
        tiles((20, 20), (0, 8), (4, 4))
    with pytest.raises(ValueError, match="1 parts for 2 tiles"):
        blend([torch.zeros(2, 2)], [Tile(0, 0, 2, 2)] * 2, (2, 2))
    with pytest.raises(ValueError, match=r"do not cover a map of \(2, 3\)"):
        blend([torch.zeros(2, 2)], [Tile(0, 0, 2, 2)], (2, 3))
