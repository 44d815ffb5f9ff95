"""Compiled plans against the whole mask: every pattern, odd canvases with text, slices, policies, lists by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glocal.canvas import Canvas, Layout, Policy, tile
from glocal.patterns import (
    Axial,
    AxisSlice,
    Blocks,
    Causal,
    CausalWindow,
    Dense,
    Grid,
    Neighborhood,
    Pattern,
    RadialBlocks,
    RadialTokens,
    Sinks,
    StridedShards,
    TileWindows,
    Windows,
    frame,
    per_head,
)
from glocal.plan.blockplan import BlockPlan, unpack
from glocal.plan.build import PlanSpec, clear_cache, plan

LINE, PLANE, VIDEO = (37,), (7, 9), (5, 3, 7)
POLICY: dict[tuple[str, str], Policy] = {("before", "*"): "causal", ("grid", "after"): "none"}
SPECS = (PlanSpec(8, 8), PlanSpec(16, 4), PlanSpec(6, 32))

EVERYWHERE = [
    Dense(),
    Neighborhood(3),
    Neighborhood(3, stride=2, border="clip"),
    Neighborhood(3, dilation=2, oversize="full"),
    Neighborhood(3, causal=True),
    Windows(3, roll=1),
    Windows(count=2, roll=1, masked=False),
    Grid(2),
    Axial(0),
    Causal(),
    CausalWindow(9),
    Sinks(5),
    AxisSlice(0, 0, 1, "q"),
    TileWindows(2, 2, oversize="full"),
    ~Neighborhood(3),
    (Sinks(2) | CausalWindow(6)) & Causal(),
    per_head([Causal(), Dense(), Causal(), Windows(2)]),
]
OF_LINES = [StridedShards(4, 2, 3, 4), StridedShards(4, 2, 3, 4, num_kv_heads=2, causal=False)]
OF_VIDEO = [RadialTokens(), RadialTokens(sink=False), Neighborhood(3) | frame(-1)]
CASES = [
    *((p, s) for p in EVERYWHERE for s in (LINE, PLANE, VIDEO)),
    *((p, LINE) for p in OF_LINES),
    *((p, VIDEO) for p in OF_VIDEO),
]


def same(pattern: Pattern, layout: Layout, spec: PlanSpec) -> BlockPlan:
    """The plan, after a comparison with the mask and a look at its states."""
    want = pattern.mask(layout)
    made = plan(pattern, layout, spec)
    assert torch.equal(made.dense_counts()[0].expand(want.shape), want.int())
    assert made.kept == pytest.approx(float(want.double().mean()))
    check_states(made, want)
    return made


def check_states(made: BlockPlan, want: Tensor) -> None:
    """Full blocks hold no hidden pair and no padded key, partial ones a visible and a hidden one, others nothing."""
    rows = made.q_order[0, 0].long().reshape(-1, made.q_block)
    columns = made.kv_order[0, 0].long().reshape(-1, made.kv_block)
    for head in range(want.shape[0]):
        own = int(made.owner[0, head if made.owner.shape[1] > 1 else 0])
        padded = torch.nn.functional.pad(want[head], (0, 1, 0, 1))  # index -1 is the padding
        seen = padded[rows[:, None, :, None], columns[None, :, None, :]]  # [q blocks, kv blocks, q, k]
        free = seen | (rows < 0)[:, None, :, None]
        some, every = seen.flatten(2).any(-1), free.flatten(2).all(-1)
        states = [torch.zeros_like(some) for _ in range(2)]
        for state, lists in zip(states, (made.full, made.partial), strict=True):
            u, row, column, _ = lists.entries()
            state[row[u == own], column[u == own]] = True
        assert torch.equal(states[0], some & every)
        assert torch.equal(states[1], some & ~every)


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=repr)
def test_every_pattern_on_an_odd_canvas(pattern: Pattern, shape: tuple[int, ...]) -> None:
    for spec in SPECS:
        same(pattern, Layout.of(Canvas(shape)), spec)


@pytest.mark.parametrize(("pattern", "shape"), [c for c in CASES if c[0] not in OF_LINES], ids=repr)
def test_text_and_policy(pattern: Pattern, shape: tuple[int, ...]) -> None:
    canvas = Canvas(shape, before=3, after=2)
    for policy in ({}, POLICY):
        same(pattern, Layout(canvas, canvas, policy), SPECS[0])


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=repr)
def test_slices(pattern: Pattern, shape: tuple[int, ...]) -> None:
    canvas = Canvas(shape)
    size = canvas.size
    cuts: list[dict[str, Any]] = [
        {"q_start": size - 1},
        {"q_start": 5, "q_tokens": 11},
        {"kv_start": 4, "kv_tokens": 20, "q_start": 3},
        {"q_tokens": 0},
    ]
    for kwargs in cuts:
        layout = Layout(canvas, canvas, **kwargs)
        want = pattern.mask(layout)
        made = plan(pattern, layout, SPECS[0])
        assert torch.equal(made.dense_counts()[0].expand(want.shape), want.int())


def test_blocks_with_text_keep_their_rule() -> None:
    canvas = Canvas((4, 3, 5), after=7)
    same(RadialBlocks(8, 0.5), Layout.of(canvas), SPECS[0])
    same(RadialBlocks(8, model="hunyuan"), Layout.of(canvas), SPECS[2])


def test_lists_are_shared_by_equal_heads() -> None:
    canvas = Canvas((6, 6))
    made = plan(per_head([Causal(), Dense(), Causal(), Dense()]), canvas, PlanSpec(9, 9))
    assert made.full.count.shape[0] == 2
    assert made.owner.tolist() == [[0, 1, 0, 1]]


def test_text_against_another_canvas() -> None:
    layout = Layout(Canvas((5, 5)), Canvas([*Canvas((5, 5), before=4).parts]), {("grid", "before"): "all"})
    same(Neighborhood(3), layout, SPECS[1])


def test_few_masks_for_a_neighbourhood() -> None:
    made = plan(Neighborhood((9, 9)), Canvas((64, 64)), PlanSpec(64, 64))
    assert made.masks.shape[0] <= 200
    assert unpack(made.masks, 64).flatten(1).any(1).all()


def test_the_cache_knows_content_and_forgets() -> None:
    clear_cache()
    first = plan(Neighborhood(3), Canvas((8, 8)), PlanSpec(16, 16))
    assert plan(Neighborhood(3), Canvas((8, 8)), PlanSpec(16, 16)) is first
    order = tile(Canvas((8, 8)), (2, 8))
    assert plan(Neighborhood(3), Canvas((8, 8)), PlanSpec(16, 16, order, order)) is not first
    clear_cache()
    again = plan(Neighborhood(3), Canvas((8, 8)), PlanSpec(16, 16))
    assert again is not first
    assert again.fingerprint == first.fingerprint


def test_bad_block_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="PlanSpec: kv_block=0 must be at least 1"):
        PlanSpec(8, 0)
    with pytest.raises(ValueError, match="has blocks of 16 tokens, but q_block=8"):
        PlanSpec(8, 16, q_order=tile(Canvas((8, 8)), (4, 4)))


def test_another_geometry_is_refused() -> None:
    made = plan(Neighborhood(3), Canvas((8, 8)), PlanSpec(16, 16))
    with pytest.raises(ValueError, match=r"is for 64 queries and 64 keys .* but q has 65 and k has 64 tokens"):
        made.check(65, 64)


def test_random_block_rules(generator: torch.Generator) -> None:
    layout = Layout.of(Canvas((5, 7), before=3))
    for _ in range(5):
        kept = torch.rand(2, 5, 8, generator=generator) < 0.4
        same(Blocks(kept, 8, 5), layout, PlanSpec(6, 9))


@st.composite
def neighbourhoods(draw: st.DrawFn) -> tuple[Neighborhood, tuple[int, ...]]:
    """Any window, stride, dilation, causal and border that fits a small canvas of one to three axes."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    rules = []
    for length in shape:
        dilation = draw(st.integers(1, max(1, length // 2)))
        window = draw(st.integers(1, length // dilation))
        causal, border = draw(st.booleans()), draw(st.sampled_from(["shift", "clip"]))
        rules.append((window, draw(st.integers(1, window)), dilation, causal, border))
    window, stride, dilation, causal, border = zip(*rules, strict=True)
    return Neighborhood(window, stride, dilation, causal, border), shape


@settings(max_examples=60, deadline=None)
@given(neighbourhoods(), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_any_neighbourhood(
    case: tuple[Neighborhood, tuple[int, ...]], q_block: int, kv_block: int, before: int
) -> None:
    same(case[0], Layout.of(Canvas(case[1], before=before)), PlanSpec(q_block, kv_block))
