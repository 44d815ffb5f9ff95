"""Plans from maps of picked blocks."""

from __future__ import annotations

import pytest
import torch

from glocal.canvas import Canvas, Layout
from glocal.ops import attend
from glocal.plan import plan_blocks
from glocal.plan.facts import declared_turned, order_facts
from glocal.routing import Partition, Selection, from_mask


def side(tokens: int, block: int) -> Partition:
    return Partition.blocks(tokens, block)


@pytest.mark.parametrize("tokens", [(64, 64), (61, 75)], ids=str)
@pytest.mark.parametrize("lead", [(1, 1), (2, 3)], ids=str)
def test_sees_what_is_picked(tokens: tuple[int, int], lead: tuple[int, int], generator: torch.Generator) -> None:
    layout = Layout(Canvas((tokens[0],)), Canvas((tokens[1],)))
    parts = side(tokens[0], 8), side(tokens[1], 16)
    scores = torch.rand(*lead, parts[0].groups, parts[1].groups, generator=generator)
    picked = scores > 0.6
    picked[..., 2, :] = False  # a row without keys
    made = plan_blocks(picked, layout, *parts, backward=True)
    want = picked.repeat_interleave(8, 2).repeat_interleave(16, 3)[..., : tokens[0], : tokens[1]]
    assert torch.equal(made.dense_counts(), want.int())
    assert made.full.index.shape[-1] == parts[1].groups or tokens[1] % 16
    assert (declared_turned(made.full.index) is not None) == (tokens[1] % 16 == 0)
    assert order_facts(made.q_order, tokens[0]).identity and not order_facts(made.kv_order, tokens[1]).holes


def test_equals_the_selection_of_the_same_map(generator: torch.Generator) -> None:
    layout, part = Layout.of(Canvas((64,))), side(64, 16)
    picked = torch.rand(1, 2, 4, 4, generator=generator) > 0.5
    q, k, v = (torch.randn(1, 2, 64, 8, generator=generator) for _ in range(3))
    a = attend(q, k, v, plan_blocks(picked, layout, part, part))
    b = attend(q, k, v, from_mask(layout, part, part, picked))
    assert torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


def test_groups_that_follow_from_a_canvas_are_made_once() -> None:
    assert Partition.blocks(96, 16) is Partition.blocks(96, 16)
    assert Partition.blocks(Canvas((8, 12)), (4, 4)) is Partition.blocks(Canvas((8, 12)), (4, 4))
    assert Partition.blocks(96, 16).fixed and not Partition.clusters(torch.tensor([0, 1, 0]), 2).fixed


def test_bad_maps_are_refused() -> None:
    layout, part = Layout.of(Canvas((64,))), side(64, 16)
    with pytest.raises(ValueError, match=r"picked of shape \(1, 4, 4\) must be \[batch\|1, heads\|1, 4, 4\]"):
        plan_blocks(torch.ones(1, 4, 4, dtype=torch.bool), layout, part, part)
    with pytest.raises(ValueError, match=r"picked is torch.float32; legal: bool, for example scores >= threshold"):
        plan_blocks(torch.ones(1, 1, 4, 4), layout, part, part)


def test_lists_that_point_nowhere_are_refused(generator: torch.Generator) -> None:
    layout, part = Layout.of(Canvas((64,))), side(64, 16)
    index = torch.tensor([[[[0], [4], [1], [2]]]], dtype=torch.int32)
    wrong = Selection(layout, part, part, index, torch.ones(1, 1, 4, dtype=torch.int32))
    q = torch.randn(1, 1, 64, 8, generator=generator)
    with pytest.raises(ValueError, match=r"a list names a key group outside 0 to 3, or more than 1 groups"):
        attend(q, q, q, wrong)


def test_a_width_that_is_too_small_is_refused() -> None:
    layout, part = Layout.of(Canvas((64,))), side(64, 16)
    with pytest.raises(ValueError, match="most=2, but a row lists 4 groups"):
        from_mask(layout, part, part, torch.ones(4, 4, dtype=torch.bool), most=2)
    assert from_mask(layout, part, part, torch.eye(4, dtype=torch.bool), most=3).index.shape[-1] == 3
