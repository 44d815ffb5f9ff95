import pytest
import torch
from safetensors.torch import load_file

from glocal.canvas import Canvas, Layout
from glocal.patterns import Windows

SHAPES = [(7,), (8, 6), (5, 7), (3, 4, 5)]


def ring(x, length, size, roll):
    return ((x - roll) % length) // size


def same_window(shape, size, roll, masked):
    def rule(q, k):
        for a, b, length in zip(q, k, shape, strict=True):
            if ring(a, length, size, roll) != ring(b, length, size, roll):
                return False
            if masked and (a < roll) != (b < roll):
                return False
        return True

    return rule


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("roll", [0, 1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_windows_equal_rolled_map(agrees, shape, size, roll, masked):
    seen = agrees(Windows(size, roll=roll, masked=masked), shape, same_window(shape, size, roll, masked))
    assert bool(seen.diagonal().all())


@pytest.mark.parametrize(("length", "count"), [(8, 2), (7, 2), (68, 5), (5, 4), (3, 9)])
def test_windows_by_count_are_ceil_sized(agrees, length, count):
    size = -(-length // count)
    agrees(Windows(count=count), (length,), lambda q, k: q[0] // size == k[0] // size)


def test_each_axis_has_its_own_size_and_roll(agrees):
    agrees(
        Windows((2, 3), roll=(0, 1)),
        (5, 7),
        lambda q, k: q[0] // 2 == k[0] // 2 and ring(q[1], 7, 3, 1) == ring(k[1], 7, 3, 1) and (q[1] < 1) == (k[1] < 1),
    )


def test_swin_regions():
    """Swin numbers 3 x 3 regions of the rolled map; tokens see each other in one window and one region."""
    side, window, shift = 8, 4, 2
    region = torch.zeros(side, side, dtype=torch.long)
    cuts = [slice(0, -window), slice(-window, -shift), slice(-shift, None)]
    for a, rows in enumerate(cuts):
        for b, columns in enumerate(cuts):
            region[rows, columns] = 3 * a + b
    place = torch.arange(side) // window
    number = place[:, None] * 2 + place[None]
    token = torch.arange(side * side).view(side, side).roll((-shift, -shift), (0, 1)).flatten()
    want = torch.zeros(side * side, side * side, dtype=torch.bool)
    same = lambda t: t.flatten()[:, None] == t.flatten()[None]  # noqa: E731
    want[token[:, None], token[None]] = same(region) & same(number)
    assert torch.equal(Windows(window, roll=shift).mask(Layout.of(Canvas((side, side))))[0], want)


def test_maxvit_window_partition(golden):
    case = load_file(golden("maxvit/partition_6x8_2.safetensors"))
    x, groups = case["in.x"][0, ..., 0].flatten(), case["out.window"][:12, ..., 0].flatten(1)
    seen = Windows(2).mask(Layout.of(Canvas((6, 8))))[0]
    for group in groups:
        places = torch.isin(x, group).nonzero().flatten()
        assert torch.equal(seen[places[0]].nonzero().flatten(), places)


def test_errors():
    with pytest.raises(ValueError, match=r"size=None and count=None; give exactly one"):
        Windows()
    with pytest.raises(ValueError, match=r"size=\(2, 0\) must be at least 1"):
        Windows((2, 0))
    with pytest.raises(ValueError, match=r"size=\(2, 2\) has 2 entries, but the grid has 3 axes"):
        Windows((2, 2)).check(Layout.of(Canvas((4, 4, 4))))
    with pytest.raises(ValueError, match=r"axes \(4, 4\) for queries but \(2, 4\) for keys"):
        Windows(2).check(Layout(Canvas((4, 4)), Canvas((2, 4))))
