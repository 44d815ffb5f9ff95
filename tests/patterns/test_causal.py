from math import prod

import pytest
import torch

from glocal.canvas import Canvas, Layout, Part
from glocal.patterns import Causal, CausalWindow
from glocal.patterns.relations import raster_band, raster_prefix

SHAPES = [(9,), (5, 7), (1, 6), (3, 4, 5), (2, 1, 3), (2, 3, 2, 2)]


def raster(place, shape):
    index = 0
    for x, n in zip(place, shape, strict=True):
        index = index * n + x
    return index


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_is_raster_order(agrees, shape):
    seen = agrees(Causal(), shape, lambda q, k: raster(k, shape) <= raster(q, shape))
    assert bool(seen.diagonal().all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 5, 8, 100])
def test_window_ends_at_the_query(agrees, shape, window):
    agrees(CausalWindow(window), shape, lambda q, k: 0 <= raster(q, shape) - raster(k, shape) < window)


@pytest.mark.parametrize("shape", SHAPES)
def test_bands_are_exact_for_every_range(shape):
    n = prod(shape)
    coords = Canvas(shape).coords()
    distance = coords.index[None] - coords.index[:, None]
    for low in range(-n, n + 1, max(1, n // 9)):
        for high in range(low - 1, n + 1, max(1, n // 7)):
            seen = torch.zeros(n, n, dtype=torch.bool)
            for term in raster_band(shape, low, high):
                every = torch.ones(n, n, dtype=torch.bool)
                for axis, (relation, length) in enumerate(zip(term, shape, strict=True)):
                    every &= relation.sees(coords.axes[axis][:, None], coords.axes[axis][None], length)
                seen |= every
            assert torch.equal(seen, (distance >= low) & (distance <= high))


def test_bands_need_few_terms():
    assert len(raster_band((30, 48, 80), -115200, 0)) == 3
    assert len(raster_band((30, 48, 80), -5000, 5000)) <= 16


@pytest.mark.parametrize("shape", SHAPES)
def test_prefix_is_exact(shape):
    coords = Canvas(shape).coords()
    for tokens in range(prod(shape) + 3):
        seen = torch.zeros(prod(shape), dtype=torch.bool)
        for term in raster_prefix(shape, tokens):
            every = torch.ones_like(seen)
            for axis, (relation, length) in enumerate(zip(term, shape, strict=True)):
                every &= relation.sees(coords.axes[axis], coords.axes[axis], length)
            seen |= every
        assert torch.equal(seen, coords.index < tokens)


def test_repeated_grid_counts_inside_the_part():
    """Registers between the frames do not shift the order of the patches."""
    canvas = Canvas([Part("register", 2, times=3), Part("patch", (2, 2), times=3)])
    seen = Causal().mask(Layout.of(canvas))[0]
    patches = canvas.indices("patch")
    assert torch.equal(seen[patches[:, None], patches], torch.ones(12, 12).tril().bool())
    assert bool(seen[canvas.indices("register")].all())


def test_decode_step_sees_the_whole_past():
    canvas = Canvas((10,))
    layout = Layout(canvas, canvas, q_start=7, q_tokens=1)
    assert Causal().mask(layout)[0, 0].tolist() == [True] * 8 + [False] * 2
    assert CausalWindow(3).mask(layout)[0, 0].nonzero().flatten().tolist() == [5, 6, 7]


def test_errors():
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        CausalWindow(0)
