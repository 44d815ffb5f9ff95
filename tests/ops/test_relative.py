from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.kernels.call import TableBias
from glocal.ops import Relative
from glocal.ops._rows import looked_up


def by_definition(table: Tensor, layout: Layout, name: str, steps: tuple[int, ...], sign: int) -> Tensor:
    """[H, Nq, Nk] from coordinates, pair by pair."""
    q, k = layout.q_coords(), layout.kv_coords()
    out = torch.zeros(table.shape[0], layout.nq, layout.nk)
    for i, j in product(range(layout.nq), range(layout.nk)):
        if q.part[i] != layout.q.number(name) or k.part[j] != layout.kv.number(name):
            continue
        place = []
        for axis, (step, extent) in enumerate(zip(steps, table.shape[1:], strict=True)):
            gap = sign * (int(k.axes[axis][j]) // step - int(q.axes[axis][i]) // step) + extent // 2
            place.append(gap if 0 <= gap < extent else None)
        if None not in place:
            out[:, i, j] = table[(slice(None), *place)]
    return out


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("shape", "extent", "steps"),
    [
        ((11,), (5,), (1,)),
        ((5, 7), (3, 5), (1, 2)),
        ((5, 7), (9, 13), (1, 1)),
        ((4, 3), (3, 15), (1, 1)),
        ((3, 4, 5), (3, 5, 3), (1, 1, 2)),
        ((2, 5, 4), (5, 1, 3), (2, 1, 1)),
    ],
)
def test_table_equals_the_definition(
    shape: tuple[int, ...], extent: tuple[int, ...], steps: tuple[int, ...], sign: int, generator: torch.Generator
) -> None:
    table = torch.randn(2, *extent, generator=generator)
    layout = Layout(Canvas(shape, before=2), Canvas(shape, after=3))
    bias = Relative(table, steps, sign).lower(layout)
    assert isinstance(bias, TableBias)
    found = looked_up(bias.table, bias.k_code[None, :] - bias.q_code[:, None])
    torch.testing.assert_close(found, by_definition(table, layout, "grid", steps, sign))


def test_a_table_that_no_pair_leaves_is_read_as_it_is(generator: torch.Generator) -> None:
    table = torch.randn(2, 5, 7, generator=generator)
    layout = Layout.of(Canvas((6, 9)))
    whole, within = Relative(table, (1, 2)).lower(layout), Relative(table, (1, 2), within=True).lower(layout)
    assert isinstance(whole, TableBias) and isinstance(within, TableBias)
    assert within.table.shape == (2, 35) and within.table.data_ptr() == table.data_ptr()
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(6), torch.arange(9) // 2, indexing="ij"))
    near = ((y[:, None] - y).abs() <= 2) & ((x[:, None] - x).abs() <= 3)
    read = [looked_up(b.table, b.k_code[None, :] - b.q_code[:, None]) for b in (whole, within)]
    assert torch.equal(read[0][:, near], read[1][:, near]) and bool(near.any()) and not bool(near.all())


def test_slices_and_several_grids(generator: torch.Generator) -> None:
    table = torch.randn(1, 3, 3, generator=generator)
    canvas = Canvas([Part("a", (3, 4)), Part("b", (2, 5))])
    layout = Layout(canvas, canvas, q_start=5, kv_start=2, q_tokens=12)
    bias = Relative(table, part="b").lower(layout)
    assert isinstance(bias, TableBias)
    found = looked_up(bias.table, bias.k_code[None, :] - bias.q_code[:, None])
    torch.testing.assert_close(found, by_definition(table, layout, "b", (1, 1), 1))


def test_a_small_table_stays_small_on_a_large_canvas() -> None:
    bias = Relative(torch.zeros(1, 5, 5, 5)).lower(Layout.of(Canvas((30, 48, 80))))
    assert isinstance(bias, TableBias)
    assert bias.table.numel() == 5 * 50 * 82  # inner axes have room for every offset, the outermost needs none


def test_refuses_in_words() -> None:
    layout = Layout.of(Canvas((5, 7)))
    with pytest.raises(ValueError, match=r"table of shape \(2, 4, 5\) must be \[heads, 2 odd extents\]"):
        Relative(torch.zeros(2, 4, 5)).lower(layout)
    with pytest.raises(ValueError, match=r"sign=0 must be 1 or -1"):
        Relative(torch.zeros(2, 5, 5), sign=0).lower(layout)
    with pytest.raises(ValueError, match="has no part 'video'"):
        Relative(torch.zeros(2, 5, 5), part="video").lower(layout)
