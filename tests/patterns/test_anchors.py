import pytest
import torch

from glocal.canvas import Canvas, Layout
from glocal.patterns import AxisSlice, Causal, Neighborhood, Sinks, frame

SHAPES = [(9,), (5, 7), (3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 1000])
def test_sinks_are_the_first_tokens(agrees, shape, tokens):
    index = {
        p: i
        for i, p in enumerate(map(tuple, torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist()))
    }
    agrees(Sinks(tokens), shape, lambda q, k: index[k] < tokens)


@pytest.mark.parametrize("side", ["kv", "q"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 3), (None, -1), (-1, None), (2, 99)])
def test_slices_of_an_axis(agrees, side, start, stop):
    shape = (3, 5, 4)
    held = range(5)[start:stop]
    agrees(AxisSlice(1, start, stop, side), shape, lambda q, k: (k if side == "kv" else q)[1] in held)


def test_frames(agrees):
    agrees(frame(0), (3, 2, 2), lambda q, k: k[0] == 0)
    agrees(frame(-1, "q"), (3, 2, 2), lambda q, k: q[0] == 2)
    agrees(frame(-2), (3, 2, 2), lambda q, k: k[0] == 1)


def test_sinks_with_a_causal_window_of_language_models():
    """Attention sinks and a sliding window: the union is cut by the triangle."""
    seen = ((Sinks(2) | Neighborhood(3, causal=True)) & Causal()).mask(Layout.of(Canvas((8,))))[0]
    assert seen[6].nonzero().flatten().tolist() == [0, 1, 4, 5, 6]
    assert seen[0].nonzero().flatten().tolist() == [0]


def test_errors():
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        Sinks(0)
    with pytest.raises(ValueError, match="side='both'; legal: 'kv'"):
        AxisSlice(0, side="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"axis=3, but the grid \(4, 4\) has axes 0 to 1"):
        AxisSlice(3).check(Layout.of(Canvas((4, 4))))
    with pytest.raises(ValueError, match="start=5, stop=None holds no token of axis 0 with length 4"):
        AxisSlice(0, 5).check(Layout.of(Canvas((4, 4))))
