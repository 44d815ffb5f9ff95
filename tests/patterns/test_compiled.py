"""Every pattern, compiled to a plan with any block sizes, is still its own definition."""

import pytest
import torch

from glocal.canvas import Canvas, Layout, named
from glocal.patterns import (
    Axial,
    AxisSlice,
    Blocks,
    Causal,
    CausalWindow,
    Dense,
    Grid,
    Neighborhood,
    RadialBlocks,
    RadialTokens,
    Sinks,
    StridedShards,
    TileWindows,
    Windows,
    frame,
    per_head,
)
from glocal.plan.build import PlanSpec, plan

CANVASES = [
    Layout.of(Canvas((61,))),
    Layout.of(Canvas((8, 6))),
    Layout(Canvas((5, 7), before=3), Canvas((5, 7), before=3), {("before", "*"): "none"}),
    Layout(Canvas((3, 4, 5), after=3), Canvas((3, 4, 5), after=3), {("after", "after"): "causal"}),
]
PATTERNS = [
    Neighborhood(3),
    Windows(3, roll=1),
    Windows(count=2, roll=1, masked=False),
    Grid(2),
    Grid(stride=2),
    Axial(0),
    Causal(),
    CausalWindow(7),
    Sinks(5),
    frame(-1),
    AxisSlice(0, 1, 2, "q"),
    TileWindows(2, 2, oversize="full"),
    RadialTokens(),
    RadialTokens(sink=False),
    RadialBlocks(8, 0.5),
    StridedShards(4, 2, 3, 2),
    StridedShards(4, 2, 3, 2, causal=False),
    (Sinks(3) | CausalWindow(5)) & Causal(),
    Neighborhood(3) | ~Grid(2),
    per_head([Causal(), Windows(2), Dense()]),
]


@pytest.mark.parametrize("layout", CANVASES, ids=lambda layout: repr(layout.q))
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_plan_is_the_definition(pattern, layout):
    try:
        pattern.check(layout)
    except ValueError:
        return  # patterns of sequences or of frames, on another canvas
    want = pattern.mask(layout).int()
    for spec in (PlanSpec(8, 8), PlanSpec(4, 16), PlanSpec(16, 6)):
        got = plan(pattern, layout, spec).dense_counts()[0]
        assert torch.equal(got.expand_as(want), want)


@pytest.mark.parametrize("order", ["raster", "gilbert", "snake"])
def test_block_masks_with_other_block_sizes_and_orders(generator, order):
    canvas = Canvas((6, 7), before=3)
    kept = torch.rand(2, 9, 7, generator=generator) < 0.5
    pattern = Blocks(kept, 5, 7, order)
    want = pattern.mask(Layout.of(canvas)).int()
    for spec in (PlanSpec(5, 7), PlanSpec(8, 4), PlanSpec(5, 7, named(canvas, order), named(canvas, order))):
        assert torch.equal(plan(pattern, canvas, spec).dense_counts()[0], want)
    twice = per_head([Blocks(kept[:1], 5, 7, order), Blocks(kept[1:], 5, 7, order)])
    assert torch.equal(plan(twice, canvas, PlanSpec(8, 8)).dense_counts()[0], want)


@pytest.mark.parametrize(
    "pattern",
    [
        Windows(64, roll=10),
        Windows(count=7),
        TileWindows(16, 5),
        CausalWindow(100),
        Grid(stride=3),
        Sinks(9),
        ~Causal(),
    ],
    ids=repr,
)
def test_long_sequences_from_spans(pattern):
    canvas = Canvas((2301,))  # longer than axes that are planned from a table
    assert plan(pattern, canvas, PlanSpec(64, 64)).visible_pairs == int(pattern.mask(Layout.of(canvas)).sum())
