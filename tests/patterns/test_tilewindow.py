import pytest
import torch

from glocal.canvas import Canvas, Layout
from glocal.patterns import Neighborhood, TileWindows


def shifted(q, k, length, tile, window, border="shift"):
    tiles = -(-length // tile)
    start = q // tile - window // 2
    end = start + window
    if border == "shift":
        if start < 0:
            start, end = 0, window
        if end > tiles:
            start, end = tiles - window, tiles
    return start <= k // tile < end


@pytest.mark.parametrize("border", ["shift", "clip"])
@pytest.mark.parametrize(
    ("shape", "tile", "window"), [((9,), 2, 3), ((8, 6), 2, 3), ((5, 7), 2, 2), ((4, 5, 6), 2, 2), ((6,), 4, 1)]
)
def test_windows_of_whole_tiles(agrees, shape, tile, window, border):
    pattern = TileWindows(tile, window, border=border)
    rule = lambda q, k: all(  # noqa: E731
        shifted(a, b, n, tile, window, border) for a, b, n in zip(q, k, shape, strict=True)
    )
    assert bool(agrees(pattern, shape, rule).diagonal().all())


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("tile", [2, 3, 4])
def test_equals_a_strided_neighborhood(window, tile):
    layout = Layout.of(Canvas((tile * 6,)))
    same = Neighborhood(tile * window, stride=tile)
    assert torch.equal(TileWindows(tile, window).mask(layout), same.mask(layout))


def test_each_axis_apart_and_oversize(agrees):
    agrees(TileWindows((2, 3), (9, 1), oversize="full"), (5, 7), lambda q, k: q[1] // 3 == k[1] // 3)


def test_errors():
    with pytest.raises(
        ValueError, match=r"window=4 tiles of 2 do not fit axis 0 of length 6 in \(6,\); largest window there: 3"
    ):
        TileWindows(2, 4).check(Layout.of(Canvas((6,))))
    with pytest.raises(ValueError, match=r"tile=\(2, 0\) must be at least 1"):
        TileWindows((2, 0), 1)
    with pytest.raises(TypeError, match="TileWindows: window='3' must be whole numbers, one an axis"):
        TileWindows(2, "3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="border='wrap'; legal: 'shift', 'clip'"):
        TileWindows(2, 1, border="wrap")  # type: ignore[arg-type]
