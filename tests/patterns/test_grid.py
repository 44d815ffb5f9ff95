import pytest
import torch
from safetensors.torch import load_file

from glocal.canvas import Canvas, Layout
from glocal.patterns import Axial, Grid

SHAPES = [(7,), (8, 6), (5, 7), (3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_grid_groups_have_equal_distances(agrees, shape, size):
    steps = [-(-n // size) for n in shape]
    seen = agrees(Grid(size), shape, lambda q, k: all(a % s == b % s for a, b, s in zip(q, k, steps, strict=True)))
    assert bool(seen.diagonal().all())
    assert int(seen.sum(1).max()) <= size ** len(shape)


def test_grid_by_stride(agrees):
    agrees(Grid(stride=(1, 3)), (4, 7), lambda q, k: q[1] % 3 == k[1] % 3)


def test_maxvit_grid_partition(golden):
    case = load_file(golden("maxvit/partition_6x8_2.safetensors"))
    x, groups = case["in.x"][0, ..., 0].flatten(), case["out.grid"][:12, ..., 0].flatten(1)
    seen = Grid(2).mask(Layout.of(Canvas((6, 8))))[0]
    for group in groups:
        places = torch.isin(x, group).nonzero().flatten()
        assert torch.equal(seen[places[0]].nonzero().flatten(), places)


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("axes", [0, (0,), (1,), (-1,), (0, 1)])
def test_axial_keeps_the_other_coordinates(agrees, shape, axes):
    free = {a % len(shape) for a in ((axes,) if isinstance(axes, int) else axes)}
    agrees(Axial(axes), shape, lambda q, k: all(q[i] == k[i] for i in range(len(shape)) if i not in free))


def test_cross(agrees):
    agrees(Axial(0) | Axial(1), (4, 5), lambda q, k: q[0] == k[0] or q[1] == k[1])


def test_errors():
    with pytest.raises(ValueError, match="size=None and stride=None; give exactly one"):
        Grid()
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        Grid(0)
    with pytest.raises(ValueError, match=r"axes=\(2,\) names axis 2, but the grid \(4, 4\) has axes 0 to 1"):
        Axial(2).check(Layout.of(Canvas((4, 4))))
    with pytest.raises(ValueError, match="names no axis"):
        Axial(())
