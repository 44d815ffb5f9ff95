import pytest
import torch
from safetensors.torch import load_file

from glocal.canvas import curves


def steps(path, shape):
    """Manhattan distance of consecutive tokens; fails if a token is missing or twice."""
    assert torch.equal(path.sort().values, torch.arange(path.numel()))
    place = torch.stack(torch.unravel_index(path, shape))  # [axes, tokens]
    return (place[:, 1:] - place[:, :-1]).abs().sum(0)


@pytest.mark.parametrize(
    "shape", [(8, 8), (5, 7), (7, 6), (1, 9), (9, 1), (2, 3, 8), (4, 4, 4), (6, 16, 16), (1, 1, 5), (5,), (1, 4, 6)]
)
def test_gilbert_moves_to_a_neighbour(shape):
    path = curves.gilbert(shape)
    assert path[0] == 0
    assert bool((steps(path, shape) == 1).all())


@pytest.mark.parametrize("shape", [(6, 9), (3, 5, 7), (5, 7, 9), (13, 30, 45)])
def test_gilbert_needs_few_longer_steps_on_odd_boxes(shape):
    far = steps(curves.gilbert(shape), shape)
    assert 1 < int(far.max()) <= 4
    assert int((far > 1).sum()) <= 0.05 * far.numel()


@pytest.mark.parametrize(("name", "shape"), [("3x4x6", (3, 4, 6)), ("5x7x9", (5, 7, 9))])
def test_gilbert_of_rectified_sparse_attention(golden, name, shape):
    case = load_file(golden(f"rectified_spaattn/gilbert_{name}.safetensors"))
    assert torch.equal(curves.gilbert(shape), case["out.hilbert_to_linear"])


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (8, 8), (32, 32), (2, 2, 2), (8, 8, 8)])
def test_hilbert_moves_to_a_neighbour(shape):
    assert bool((steps(curves.hilbert(shape), shape) == 1).all())


def test_hilbert_keeps_aligned_runs_in_cubes():
    """Every aligned run of 4^n tokens is a square: what makes it better than a snake for blocks."""
    rows, columns = torch.unravel_index(curves.hilbert((16, 16)), (16, 16))
    for run in (4, 16, 64):
        for axis in (rows, columns):
            part = axis.view(-1, run)
            assert bool((part.amax(1) - part.amin(1) + 1 == int(run**0.5)).all())


@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 3, 3), (2, 5, 4), (2, 3, 2, 2)])
def test_snake_moves_to_a_neighbour(shape):
    path = curves.snake(shape)
    assert bool((steps(path, shape) == 1).all())
    assert path[: shape[-1]].tolist() == list(range(shape[-1]))


def test_snake_is_the_first_continuous_scan(golden):
    paths = load_file(golden("lamamba_diff/scan_order.safetensors"))["out.paths"]
    assert torch.equal(curves.snake((4, 4)), paths[0])


def test_axes_permute_the_reading_order():
    assert curves.axes((2, 3), (1, 0)).tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(curves.axes((2, 3, 4), (0, 1, 2)), torch.arange(24))


def test_errors():
    with pytest.raises(ValueError, match=r"shape=\(2, 2, 2, 2\) has 4 axes; legal: 1, 2 or 3"):
        curves.gilbert((2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"shape=\(4, 8\) must be a square or cube with a power-of-two side"):
        curves.hilbert((4, 8))
    with pytest.raises(ValueError, match="power-of-two side; gilbert fills any box"):
        curves.hilbert((6, 6))
    with pytest.raises(ValueError, match=r"permutation=\(0, 0\) must name each of the axes 0 to 1 once"):
        curves.axes((2, 3), (0, 0))
