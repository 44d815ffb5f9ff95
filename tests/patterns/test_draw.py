import pytest
import torch

from glocal.canvas import Canvas, Layout
from glocal.patterns import Causal, Neighborhood, StridedShards
from glocal.patterns.draw import ASKED, GAP, SEEN


def is_colour(image, colour):
    return (image == torch.tensor(colour, dtype=torch.uint8)).all(-1)


def test_sequence_shows_the_whole_mask():
    image = Causal().draw(Canvas((6,)), scale=1)
    assert image.dtype == torch.uint8 and image.shape == (6, 6, 3)
    assert torch.equal(is_colour(image, SEEN), torch.ones(6, 6).tril().bool())
    assert Causal().draw(Canvas((6,))).shape == (510, 510, 3)


def test_grid_shows_what_a_query_sees():
    image = Neighborhood(3).draw(Canvas((5, 7), before=2), (0, 3), scale=1)
    assert image.shape == (5, 7, 3)
    asked = is_colour(image, ASKED)
    assert asked.nonzero().tolist() == [[0, 3]]
    assert int(is_colour(image, SEEN).sum()) == 8
    assert torch.equal(image, Neighborhood(3).draw(Canvas((5, 7), before=2), 2 + 3, scale=1))


def test_frames_stand_side_by_side():
    image = Neighborhood(3).draw(Canvas((3, 4, 5)), scale=2)
    assert image.shape == (8, (3 * 5 + 2) * 2, 3)
    assert bool(is_colour(image, GAP)[:, 10:12].all())


def test_several_queries_and_heads():
    image = Neighborhood(3).draw(Canvas((6, 6)), [(0, 0), (5, 5)], scale=1)
    assert int(is_colour(image, ASKED).sum()) == 2 and int(is_colour(image, SEEN).sum()) == 16
    a, b = (StridedShards(4, 1, 3, 3).draw(Canvas((24,)), head=h) for h in (0, 1))
    assert not torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match="4096 x 4096 tokens is too large for a picture"):
        Causal().draw(Canvas((4096,)))
    with pytest.raises(ValueError, match=r"query=\(9, 0\) is no place of the grid \(4, 4\)"):
        Neighborhood(3).draw(Canvas((4, 4)), (9, 0))
    with pytest.raises(ValueError, match=r"query=16 must lie in 0..15"):
        Neighborhood(3).draw(Canvas((4, 4)), 16)
    with pytest.raises(ValueError, match="scale=0 must be at least 1"):
        Causal().draw(Layout.of(Canvas((4,))), scale=0)
