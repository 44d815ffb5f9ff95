"""Tiles that are boxes of a grid: found in an order, and read as a TMA descriptor would read them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, tile

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def order_of(axes: tuple[int, ...], box: tuple[int, ...], block: int, slowest: int = 0) -> Tensor:
    return tile(Canvas(axes), box, block=block, slowest=slowest).gather[None, None].int()


def read(t: Tensor, rows: int, order: Tensor) -> Tensor | None:
    """Rows of t [B, H, N, D] in plan order as a descriptor reads them: 0 beyond the edge of its shape."""
    from glocal.kernels.gluon.boxes import BITS, boxes_of, seen

    boxes = boxes_of(order, t.shape[2], rows)
    way = None if boxes is None else seen(t, boxes)
    if boxes is None or way is None:
        return None
    view = t.as_strided((*way.shape, t.shape[3]), (*way.strides, 1), t.storage_offset())
    room = torch.nn.functional.pad(view, (0, 0, *(side for n in way.box[::-1] for side in (0, n))))
    found = torch.zeros(*t.shape[:2], order.shape[2], t.shape[3])
    for b in range(t.shape[0]):
        for h in range(t.shape[1]):
            for i, corner in enumerate(boxes.corners.tolist()):
                at = (
                    b * way.lead[0] + h * way.lead[1],
                    b * way.lead[2] + h * way.lead[3] + (corner >> 2 * BITS),
                    corner >> BITS & (1 << BITS) - 1,
                    corner & (1 << BITS) - 1,
                )
                piece = room[tuple(slice(a, a + n) for a, n in zip(at, way.box, strict=True))]
                found[b, h, i * rows : (i + 1) * rows] = piece.reshape(rows, -1)
    return found


CASES = {
    "video": ((6, 16, 8), (2, 8, 8), 128, 0),
    "video with edges": ((5, 12, 10), (2, 8, 8), 128, 0),
    "video, rows slowest": ((5, 12, 10), (2, 8, 8), 128, 1),
    "video, columns slowest": ((6, 16, 24), (2, 16, 4), 128, 2),
    "image": ((24, 32), (16, 8), 128, 0),
    "image with edges": ((23, 37), (8, 16), 128, 0),
    "image, columns slowest": ((23, 37), (8, 16), 128, 1),
    "blocks of 64": ((6, 9, 8), (2, 4, 8), 64, 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("turned", [False, True])
def test_boxes_are_read_where_they_lie(name: str, rows: int, turned: bool, generator: torch.Generator) -> None:
    axes, box, block, slowest = CASES[name]
    order = order_of(axes, box, block, slowest)
    n = int(order.max()) + 1
    t = torch.randn(2, 3, n, 4, generator=generator)
    if turned:
        t = t.transpose(1, 2).contiguous().transpose(1, 2)
    got = read(t, rows, order)
    if block < rows:
        assert got is None or order.shape[2] % rows == 0
        return
    if turned and name == "video, rows slowest":  # samples would have to share an axis with frames, which come second
        assert got is None
        return
    assert got is not None
    place = order[0, 0].long()
    want = t[:, :, place.clamp(min=0)]
    live = place >= 0
    assert torch.equal(got[:, :, live], want[:, :, live])
    if not turned:
        assert not got[:, :, ~live].any()


def test_what_is_no_grid_of_boxes_is_left_to_copies(generator: torch.Generator) -> None:
    from glocal.kernels.gluon.boxes import boxes_of, seen

    order = order_of((16, 32), (8, 16), 128)
    assert boxes_of(order, 512, 64) is boxes_of(order, 512, 64)
    for other in (
        torch.randperm(512, generator=generator)[None, None].int(),
        order.flip(2),
        order.expand(1, 2, -1).contiguous(),
        torch.full_like(order, -1),
        torch.cat([order[:, :, :128], order[:, :, 192:], order[:, :, 128:192]], 2),
    ):
        assert boxes_of(other, 512, 128) is None
    assert boxes_of(order_of((37, 44), (37, 3), 128), 37 * 44, 64) is None
    order[0, 0, 5] = 9
    assert boxes_of(order, 512, 64) is None
    boxes = boxes_of(order_of((4, 12, 10), (2, 8, 8), 128), 480, 64)
    assert boxes is not None and boxes.box == (1, 8, 8) and boxes.grid == (4, 12, 10)
    assert seen(torch.zeros(2, 2, 700, 8)[:, :, :480], boxes) is not None
    assert seen(torch.zeros(3, 2, 2, 700, 8)[:, 0, :, :480], boxes) is None


def test_orders_made_for_one_call_are_not_looked_at() -> None:
    from glocal.kernels.gluon import boxes
    from glocal.kernels.gluon.launch import _boxed
    from glocal.plan.facts import CHANGING, UNKNOWN, OrderFacts

    t, order = torch.zeros(1, 1, 512, 8, dtype=torch.bfloat16), order_of((16, 32), (8, 16), 128)
    for facts in (CHANGING, UNKNOWN):
        assert _boxed([t], order, 64, facts) == [None] and order not in boxes._KNOWN
    assert _boxed([t], order, 64, OrderFacts(distinct=True, complete=True)) != [None]
