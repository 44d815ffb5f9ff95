"""Pairs of blocks and portions of lists, as the Hopper kernels take them: the same pairs of tokens, each once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glocal.canvas import Canvas
from glocal.kernels._jobs import Units
from glocal.kernels.call import Call, PlanTensors
from glocal.patterns import Neighborhood, Pattern, StridedShards
from glocal.plan import BlockPlan, PlanSpec, plan
from glocal.plan.blockplan import BlockLists
from glocal.plan.facts import order_facts

pytest.importorskip("triton.experimental.gluon")

PATTERNS = {
    "stride": (StridedShards(64, 4, 16, heads_q=2), (4096,)),
    "neighbours": (Neighborhood(24), (64, 64)),
}


def joined(made: BlockPlan, p: PlanTensors, blocks: tuple[int, int]) -> BlockPlan:
    return replace(
        made, q_block=blocks[0], kv_block=blocks[1], kv_order=p.kv_order, masks=p.masks, owner=p.owner,
        full=BlockLists(p.full_count, p.full_index), partial=BlockLists(p.part_count, p.part_index, p.part_mask),
    )  # fmt: skip


@pytest.mark.parametrize(("pattern", "canvas"), PATTERNS.values(), ids=PATTERNS)
def test_pairs_see_the_same_tokens(pattern: Pattern, canvas: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels.gluon import reblocked

    monkeypatch.setattr(reblocked, "MORE", 2.0)
    monkeypatch.setattr(reblocked, "MORE_BACKWARD", 2.0)
    made = plan(pattern, Canvas(canvas), PlanSpec(64, 64))
    p = PlanTensors(**made.tensors())
    facts = order_facts(p.kv_order, made.layout.nk)
    by_keys = reblocked.paired_keys(p, 64, p.owner.shape[1], facts)
    by_queries = reblocked.paired(p, 64)
    assert by_keys is not None and by_queries is not None
    known = order_facts(by_keys.kv_order, made.layout.nk)
    assert known.distinct and known.complete and not known.holes
    want = made.dense_counts()
    assert torch.equal(joined(made, by_keys, (64, 128)).dense_counts(), want)
    assert torch.equal(joined(made, by_queries, (128, 64)).dense_counts(), want)


def test_far_keys_are_paired_with_one_another() -> None:
    from glocal.kernels.gluon.reblocked import paired_keys

    made = plan(StridedShards(64, 4, 16, heads_q=2), Canvas((16384,)), PlanSpec(64, 64))
    p = PlanTensors(**made.tensors())
    facts = order_facts(p.kv_order, made.layout.nk)
    found = paired_keys(p, 64, 2, facts)
    assert found is not None
    visits = int(p.full_count.sum() + p.part_count.sum())
    assert 2 * int(found.full_count.sum() + found.part_count.sum()) < 1.25 * visits
    other = PlanTensors(**{**vars(p), "full_index": p.full_index.clone()})
    assert paired_keys(other, 64, 1, facts) is None  # key heads would need an order for each query head


def test_portions_cover_every_list_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels.gluon import portions
    from glocal.kernels.triton.lists import turned
    from glocal.kernels.triton.work import prepare

    monkeypatch.setattr(portions, "_LEAST", 4)
    made = plan(StridedShards(64, 4, 16, heads_q=2), Canvas((8192,)), PlanSpec(64, 64))
    p = PlanTensors(**made.tensors())
    t = torch.zeros(2, 2, 8192, 64)
    w = prepare(t, t, t, Call("gluon", 1.0, q_block=64, kv_block=64, plan=p))
    full, part = turned(p, w.kv_blocks)
    found = portions.portions(w, Units.of(p, 2, 2), full, part, 1)
    assert found is not None
    steps = (full.count + part.count).view(2, -1).repeat(2, 1).flatten()  # of samples, heads and key blocks
    number, skip, stop, place = found.programs.long().unbind(1)
    taken = [[] for _ in range(steps.numel())]
    for n, a, b in zip(number.tolist(), skip.tolist(), stop.tolist(), strict=True):
        taken[n] += range(a, min(b, int(steps[n])))
    assert [sorted(t) for t in taken] == [list(range(n)) for n in steps.tolist()]
    length = torch.minimum(stop, steps[number]) - skip
    assert int(length.max()) < 0.1 * int(steps.max())
    cut = (skip > 0) | (stop < steps[number])
    assert torch.equal(place[cut].sort().values, torch.arange(found.places)) and bool((place[~cut] == -1).all())
    for listed, first, parts in found.cut.tolist():
        here = number == listed
        assert torch.equal(place[here][skip[here].argsort()], first + torch.arange(parts))
