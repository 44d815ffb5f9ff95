from itertools import product

import pytest
import torch

from glocal.canvas import Canvas, Part, from_gather, raster, tile


def boxes(shape, box, steps):
    """Every block as the set of its places: dilation groups, then tiles, row-major."""
    ranges = [range(-(-n // (t * d))) for n, t, d in zip(shape, box, steps, strict=True)]
    for group in product(*map(range, steps)):
        for corner in product(*ranges):
            places = [
                tuple(g + d * (c * t + i) for g, d, c, t, i in zip(group, steps, corner, box, inside, strict=True))
                for inside in product(*map(range, box))
            ]
            yield [place for place in places if all(x < n for x, n in zip(place, shape, strict=True))]


@pytest.mark.parametrize(
    ("shape", "box", "dilation"),
    [((7,), (3,), 1), ((7,), (2,), 2), ((5, 7), (2, 3), 1), ((6, 7), (2, 2), (3, 1)), ((3, 4, 5), (2, 2, 2), 1)],
)
def test_blocks_are_boxes(shape, box, dilation):
    canvas = Canvas(shape, before=3)
    steps = (dilation,) * len(shape) if isinstance(dilation, int) else dilation
    order = tile(canvas, box, dilation)
    order.inverse(canvas.size)
    region = order.regions[1]
    assert region.blocks * order.block + region.first * order.block == order.gather.numel()
    found = order.gather.view(-1, order.block)[region.first :]
    table = canvas.coords()
    for block, want in zip(found, boxes(shape, box, steps), strict=True):
        tokens = block[block >= 0]
        assert [tuple(int(a[t]) for a in table.axes) for t in tokens] == want


def test_halves_of_a_block_are_halves_of_its_box():
    canvas = Canvas((8, 24))
    order = tile(canvas, (4, 8), slowest=1)
    first = order.gather.reshape(-1, 2, 16)[0, 0]
    assert sorted(first.tolist()) == sorted(y * 24 + x for y in range(4) for x in range(4))
    plain = tile(canvas, (4, 8))
    assert order.name != plain.name and order.regions == plain.regions
    assert torch.equal(order.gather.reshape(-1, 32).sort(-1).values, plain.gather.reshape(-1, 32).sort(-1).values)


@pytest.mark.parametrize("block", [1, 4, 5])
def test_raster_pads_every_part(block):
    canvas = Canvas((3, 4), before=3, after=1)
    order = raster(canvas, block)
    assert torch.equal(order.gather[order.gather >= 0], torch.arange(16))
    assert order.gather.numel() % block == 0
    assert torch.equal(order.gather[order.inverse(16)], torch.arange(16))


def test_interleaved_parts_stay_one_sequence():
    canvas = Canvas([Part("camera", 1, times=3), Part("patch", (2, 2), times=3)])
    order = raster(canvas, 4)
    assert order.gather.tolist() == [*range(15), -1]
    assert order.regions == ()


def test_gather_lists_may_be_subsets_but_rows_only_return_one_to_one():
    subset = from_gather("every second", torch.tensor([0, 2, 4, -1]))
    with pytest.raises(ValueError, match="'every second' is not one-to-one: 3 tokens are missing and 0 repeat"):
        subset.inverse(6)
    twice = from_gather("mirror", torch.tensor([0, 1, 2, 1]))
    with pytest.raises(ValueError, match="0 tokens are missing and 1 repeat"):
        twice.inverse(3)


def test_errors():
    with pytest.raises(ValueError, match=r"shape=\(2, 2\) must have 3 positive entries"):
        tile(Canvas((3, 4, 5)), (2, 2))
    with pytest.raises(ValueError, match=r"dilation=\(1, 0\) must have 2 positive entries"):
        tile(Canvas((3, 4)), (2, 2), (1, 0))
    with pytest.raises(ValueError, match="has 2 grids; name the part instead"):
        tile(Canvas([Part("a", (2, 2)), Part("b", (2, 2))]), (2, 2))
    with pytest.raises(ValueError, match=r"tile: slowest=2 must be an axis of \(3, 4\), from 0 to 1"):
        tile(Canvas((3, 4)), (2, 2), slowest=2)
