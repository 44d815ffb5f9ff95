import numpy as np
import pytest
import torch

from glocal.canvas import Canvas, Part


def test_text_and_grid():
    canvas = Canvas((2, 3), before=4, after=1)
    assert [p.name for p in canvas.parts] == ["before", "grid", "after"]
    assert canvas.size == 11
    coords = canvas.coords()
    assert coords.part.tolist() == [0] * 4 + [1] * 6 + [2]
    assert coords.axes[0][4:10].tolist() == [0, 0, 0, 1, 1, 1]
    assert coords.axes[1][4:10].tolist() == [0, 1, 2, 0, 1, 2]
    assert coords.axes[0][:4].tolist() == [0, 1, 2, 3]


def test_frames_of_special_tokens_and_patches():
    canvas = Canvas([Part("camera", 1, times=2), Part("register", 2, times=2), Part("patch", (2, 2), times=2)])
    assert canvas.size == 14
    assert canvas.indices("camera").tolist() == [0, 7]
    assert canvas.indices("register").tolist() == [1, 2, 8, 9]
    assert canvas.indices("patch").tolist() == [3, 4, 5, 6, 10, 11, 12, 13]
    assert canvas.parts[2].axes == (2, 2, 2)
    assert canvas.coords(canvas.indices("patch")).axes[0].tolist() == [0] * 4 + [1] * 4


def test_coords_of_chosen_tokens():
    canvas = Canvas((3, 4))
    some = canvas.coords(torch.tensor([[0, 5], [11, 5]]))
    assert some.axes[0].tolist() == [[0, 1], [2, 1]] and some.index.tolist() == [[0, 5], [11, 5]]


def test_value_semantics():
    assert Canvas((3, 4), before=2) == Canvas((3, 4), before=2)
    assert len({Canvas((3, 4)), Canvas((3, 4)), Canvas((3, 4), arrives="gilbert")}) == 2
    assert repr(Canvas((3, 4), before=2)) == "Canvas(before=2, grid=3x4)"


def test_errors():
    with pytest.raises(ValueError, match=r"part names \['a', 'a'\] repeat"):
        Canvas([Part("a", 2), Part("a", 3)])
    with pytest.raises(TypeError, match="parts=8 must be axis lengths"):
        Canvas(8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="before= and after= go with one grid shape"):
        Canvas([Part("a", 2)], before=1)
    with pytest.raises(ValueError, match="needs at least one axis, none negative"):
        Part("a", (2, -1))
    with pytest.raises(ValueError, match="times=0 must be at least 1"):
        Part("a", 2, times=0)
    with pytest.raises(ValueError, match="has no part 'txt'; it has"):
        Canvas((2, 2)).number("txt")
    with pytest.raises(ValueError, match="has 0 grids; name the part instead"):
        _ = Canvas([Part("a", 2)]).grid


def test_axis_lengths_may_be_numbers_of_numpy() -> None:
    canvas = Canvas(tuple(np.array([3, 5])))
    assert canvas == Canvas((3, 5)) and all(type(n) is int for n in canvas.grid.axes)
