"""Plans of windows see exactly what their pattern says, visit little more, and say where there is none."""

from __future__ import annotations

import pytest
import torch

from glocal.canvas import Canvas, Layout
from glocal.patterns import Axial, Causal, Grid, Neighborhood, PerHead, Windows
from glocal.patterns.base import Pattern
from glocal.plan.windows import window_keys, window_plan

CASES: list[tuple[Pattern, tuple[int, ...]]] = [
    (Neighborhood(7), (20, 17)),
    (Neighborhood((3, 5), dilation=(2, 3)), (11, 17)),
    (Neighborhood(4, stride=2), (9, 10)),
    (Neighborhood(5, causal=(True, False)), (9, 9)),
    (Neighborhood(5, border="clip"), (9, 12)),
    (Neighborhood(9), (50,)),
    (Neighborhood(3), (5, 6, 7)),
    (Windows(7), (15, 21)),
    (Windows(7, roll=3), (14, 21)),
    (Windows(4, roll=1, masked=False), (8, 12)),
    (Windows(count=3), (8, 11)),
    (Grid(4), (8, 12)),
    (Grid(3), (8, 11)),
    (Axial(1), (5, 6)),
    (Neighborhood(1), (1, 1)),
]


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
def test_it_sees_what_the_pattern_sees(pattern: Pattern, shape: tuple[int, ...]) -> None:
    made = window_plan(pattern, Canvas(shape))
    assert torch.equal(made.dense_counts()[0, 0], pattern.mask(Layout.of(Canvas(shape)))[0].int())
    assert made.q_block in (16, 64) and made.kv_block == 32 and not bool(made.full.count.any())
    tokens = made.q_order.flatten()
    assert torch.equal(tokens[tokens >= 0].sort().values.long(), torch.arange(made.layout.nq))


def test_it_visits_little_more() -> None:
    """A tile of 4 x 4 queries in windows of 7 x 7 touches 10 x 10 keys, padded to 128; whole windows fit better."""
    near = window_plan(Neighborhood(7), Canvas((56, 56)))
    assert window_keys(Neighborhood(7), Canvas((56, 56))) == 11 * 11
    assert near.visited / near.kept == pytest.approx(128 / 49, rel=1e-3)
    whole = window_plan(Windows(7), Canvas((56, 56)))
    assert whole.visited / whole.kept == pytest.approx(64 * 64 / 49**2, rel=1e-3)
    assert near.masks.shape[0] <= 4 * 25
    assert window_plan(Windows(7, roll=3), Canvas((56, 56))).q_blocks == whole.q_blocks == 64


def test_tiles_of_keys_count_too() -> None:
    """At a border more queries see a token than it sees keys: what `window_keys` says holds for the gradient."""
    pattern, shape = Neighborhood((5, 5, 5)), (8, 8, 8)
    made = window_plan(pattern, Canvas(shape))
    seen = pattern.mask(Layout.of(Canvas(shape)))[0]
    tiles = made.q_order.reshape(-1, made.q_block).long()
    touched = [int(seen[:, tile[tile >= 0]].any(1).sum()) for tile in tiles]
    listed = [int(seen[tile[tile >= 0]].any(0).sum()) for tile in tiles]
    assert max(touched) > max(listed) and window_keys(pattern, Canvas(shape)) == max(touched)


def test_plans_are_cached_by_content() -> None:
    assert window_plan(Neighborhood(3), Canvas((6, 6))) is window_plan(Neighborhood(3), Canvas((6, 6)))


def test_where_there_is_none() -> None:
    flat = Canvas((6, 6))
    assert window_keys(Neighborhood(3), Canvas((6, 6), before=2)) is None
    assert window_keys(Causal(), flat) is None
    assert window_keys(PerHead((Neighborhood(3), Neighborhood(5))), flat) is None
    assert window_keys(Neighborhood(3) | Windows(2), flat) is None
    assert window_keys(Neighborhood(3), Layout(flat, flat, q_start=6, q_tokens=12)) is None
    with pytest.raises(ValueError, match=r"window_plan: .* is no product of single axes on one grid of up to 3 axes"):
        window_plan(Neighborhood(3) | Windows(2), flat)
