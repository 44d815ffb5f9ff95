import pytest
import torch
from safetensors.torch import load_file

from glocal.canvas import Canvas, Part, curves, named, per_head_orders, tile


@pytest.mark.parametrize("name", ["raster", "gilbert", "snake", "wht", "htw", "tile2x2x2"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 2, 2)])
def test_orders_are_one_to_one_and_return(name, shape):
    canvas = Canvas(shape, before=3, after=2)
    order = named(canvas, name)
    where = order.inverse(canvas.size)
    assert torch.equal(order.gather[where], torch.arange(canvas.size))


def test_text_stays_where_it_is():
    canvas = Canvas((4, 4), before=3, after=2)
    gather = named(canvas, "hilbert").gather
    assert gather[:3].tolist() == [0, 1, 2] and gather[-2:].tolist() == [19, 20]
    assert torch.equal(gather[3:-2] - 3, curves.hilbert((4, 4)))


def test_blocks_never_hold_two_parts():
    canvas = Canvas((3, 5), before=3, after=2)
    order = named(canvas, "gilbert", block=4)
    assert order.block == 4 and order.gather.numel() == 4 + 16 + 4
    part = torch.where(order.gather < 0, -1, canvas.coords(order.gather.clamp(min=0)).part).view(-1, 4)
    for row in part:
        assert len({p for p in row.tolist() if p >= 0}) == 1


def test_interleaved_parts_keep_their_places():
    canvas = Canvas([Part("camera", 1, times=3), Part("patch", (2, 2), times=3)])
    gather = named(canvas, "snake", part="patch").gather
    index = canvas.indices("patch")
    camera = canvas.indices("camera")
    assert torch.equal(gather[camera], camera)
    assert torch.equal(gather[index], index[curves.snake((3, 2, 2))])


@pytest.mark.parametrize(("number", "name"), list(enumerate(["thw", "twh", "hwt", "htw", "wht", "wth"])))
def test_axis_orders_of_paroattention(golden, number, name):
    ids = load_file(golden("paro/permutations.safetensors"))["out.token_ids"][number].long()
    canvas = Canvas((3, 4, 5), before=6)
    order = named(canvas, name)
    assert torch.equal(order.gather, ids)
    assert torch.equal(order.gather[order.inverse(66)], torch.arange(66))


def test_one_order_a_head():
    canvas = Canvas((3, 5))
    both = per_head_orders([named(canvas, "snake", block=4), tile(canvas, (2, 2))])
    assert both.gather.shape == (2, 24)
    inverse = both.inverse(15)
    for head in range(2):
        assert torch.equal(both.gather[head][inverse[head]], torch.arange(15))


def test_errors():
    with pytest.raises(ValueError, match="order 'peano' is unknown on a grid .*legal: 'raster', 'gilbert'"):
        named(Canvas((3, 4)), "peano")
    with pytest.raises(ValueError, match="permutation of the letters 'hw'"):
        named(Canvas((3, 4)), "wht")
    with pytest.raises(ValueError, match="block=8 must stay 1"):
        named(Canvas((3, 4)), "tile2x2", block=8)
    with pytest.raises(ValueError, match=r"orders=\[\] holds no order"):
        per_head_orders([])
    canvas = Canvas((3, 4))
    with pytest.raises(ValueError, match=r"different block sizes \[1, 4\]"):
        per_head_orders([named(canvas, "snake"), tile(canvas, (2, 2)), named(canvas, "wh")])
