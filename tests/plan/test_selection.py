from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part, tile
from glocal.ops import attend, attention
from glocal.patterns import Causal, Neighborhood, per_head
from glocal.patterns.base import Dense, Pattern
from glocal.plan.selection import gathered, plan_selection
from glocal.routing import Keep, Partition, Selection, from_mask, pooled_topk


def twin(selection: Selection) -> Tensor:
    """How often each query sees each key, by loops over the definition, int32 [B, H, Nq, Nk]."""
    layout, within = selection.layout, selection.within
    if within is None and layout.policy:
        within = Dense()
    mask = None if within is None else within.mask(layout)
    tensors = (selection.index, selection.q_groups, selection.kv_groups)
    b = max(t.shape[0] for t in tensors)
    h = max(*(t.shape[1] for t in tensors), 1 if mask is None else mask.shape[0])
    out = torch.zeros(b, h, layout.nq, layout.nk, dtype=torch.int32)

    def of(t: Tensor, i: int, j: int) -> Tensor:
        return t[i if t.shape[0] > 1 else 0, j * t.shape[1] // h]

    for i in range(b):
        for j in range(h):
            mine, theirs = of(selection.q_groups, i, j).tolist(), of(selection.kv_groups, i, j).tolist()
            lists, counts = of(selection.index, i, j).tolist(), of(selection.count, i, j).tolist()
            for g, rows in enumerate(mine):
                keys = [t for e in lists[g][: counts[g]] for t in theirs[e] if t >= 0]
                keys = sorted(set(keys)) if selection.dedupe else keys
                for r in rows:
                    if r < 0:
                        continue
                    for c in keys:
                        seen = mask is None or bool(mask[j * mask.shape[0] // h, r, c])
                        out[i, j, r, c] += int(seen)
    return out


def drawn(
    layout: Layout,
    q_part: Partition,
    kv_part: Partition,
    generator: torch.Generator,
    sizes: tuple[int, int] = (1, 1),
    within: Pattern | None = None,
    dedupe: bool = False,
) -> Selection:
    """Random lists with repeats and empty rows."""
    shape = (*sizes, q_part.groups)
    index = torch.randint(0, kv_part.groups, (*shape, 4), generator=generator).int()
    count = torch.randint(0, 5, shape, generator=generator).int()
    return Selection(layout, q_part, kv_part, index, count, within=within, dedupe=dedupe)


def check(selection: Selection) -> None:
    plan = plan_selection(selection)
    want = twin(selection)
    assert torch.equal(plan.dense_counts().expand_as(want), want)
    assert plan.visible_pairs == pytest.approx(float(want.double().sum((-1, -2)).mean()))
    for live, masks in ((plan.full, None), (plan.partial, plan.masks)):
        rising = torch.where(
            torch.arange(live.index.shape[-1]) < live.count[..., None], live.index, torch.iinfo(torch.int32).max
        )
        assert (rising.diff(dim=-1) >= 0).all()  # key blocks in the order of memory
        del masks


CANVAS = Canvas((6, 8))
TEXT = Canvas((4, 4), before=5)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("within", [None, Neighborhood(5), Causal(), per_head([Neighborhood(3), Causal()])])
@pytest.mark.parametrize("block", [4, 5, (2, 3), (3, 3)])
@pytest.mark.parametrize("dedupe", [False, True])
def test_equals_the_definition(
    sizes: tuple, within: Pattern | None, block: int | tuple, dedupe: bool, generator: torch.Generator, monkeypatch
) -> None:
    monkeypatch.setattr("glocal.plan.selection._SMALL", 1)
    part = Partition.blocks(CANVAS, block)
    check(drawn(Layout.of(CANVAS), part, part, generator, sizes, within, dedupe))


@pytest.mark.parametrize("within", [None, Causal()])
@pytest.mark.parametrize("size", [16, 3])
def test_groups_that_differ_by_sample_and_head(within: Pattern | None, size: int, generator: torch.Generator) -> None:
    """Ragged chunks for queries, clusters for keys; small ones are gathered."""
    n, groups = 48, 48 // size
    layout = Layout.of(Canvas((n,)))
    bounds = torch.randint(0, n + 1, (2, groups + 1), generator=generator).sort().values
    bounds[:, 0], bounds[:, -1] = 0, n
    queries = Partition.chunks(bounds)
    keys = Partition.clusters(torch.randint(-1, groups, (2, 2, n), generator=generator), groups)
    check(drawn(layout, queries, keys, generator, (2, 2), within))
    check(drawn(layout, queries, keys, generator, (1, 1), within, dedupe=True))


def test_pattern_heads_multiply_lists(generator: torch.Generator) -> None:
    part = Partition.blocks(CANVAS, 6)
    four = per_head([Neighborhood(3), Causal(), Neighborhood(5), Dense()])
    check(drawn(Layout.of(CANVAS), part, part, generator, (1, 2), four))
    with pytest.raises(ValueError, match="lists for 3 heads do not fit a pattern with 4 heads"):
        plan_selection(drawn(Layout.of(CANVAS), part, part, generator, (1, 3), four))


def test_text_policy_and_slices(generator: torch.Generator) -> None:
    part = Partition.blocks(TEXT, (2, 2))
    layout = Layout(TEXT, TEXT, policy={("before", "grid"): "none"})
    check(drawn(layout, part, part, generator))
    later = Layout(Canvas((12,)), Canvas((12,)), q_start=8)
    for within in (Causal(), None):
        check(drawn(later, Partition.blocks(4, 2), Partition.blocks(12, 3), generator, within=within))


@pytest.mark.parametrize("within", [None, Neighborhood(3)])
def test_tokens_are_gathered(within: Pattern | None, generator: torch.Generator) -> None:
    layout = Layout.of(CANVAS)
    queries, tokens = Partition.blocks(CANVAS, (2, 4)), Partition.blocks(CANVAS, 1)
    selection = drawn(layout, queries, tokens, generator, (2, 2), within)
    check(selection)
    plan = plan_selection(selection)
    assert plan.kv_block == 64 and plan.kv_order.shape[:2] == (2, 2)
    assert torch.equal(twin(gathered(selection, 3)), twin(selection))


def test_frames_with_regions(generator: torch.Generator) -> None:
    canvas = Canvas([Part("camera", 1, times=3), Part("patch", (2, 3), times=3)])
    part = Partition.frames(canvas)
    check(drawn(Layout.of(canvas), part, part, generator, (2, 2)))
    map_ = Canvas((5, 7))
    regions = Partition.regions(map_, 3)
    check(drawn(Layout.of(map_), regions, regions, generator, (2, 1)))


def test_strided_shards_are_a_selection() -> None:
    """S2-Attention by position equals its shards as a selection within the causal triangle."""
    from glocal.patterns import StridedShards

    canvas = Canvas((32,))
    pattern = StridedShards(block_size=4, local_blocks=1, vert_stride=2, heads_q=2)
    mask = pattern.mask(Layout.of(canvas))
    part = Partition.blocks(canvas, 4)
    blocks = mask.unflatten(-1, (8, 4)).unflatten(-3, (8, 4)).any(-1).any(2)  # [heads, 8, 8]
    plan = plan_selection(from_mask(Layout.of(canvas), part, part, blocks, within=Causal()))
    assert torch.equal(plan.dense_counts()[0].bool(), mask)


def test_transposed_lists_keep_repeats(generator: torch.Generator) -> None:
    part = Partition.blocks(CANVAS, 6)
    plan = plan_selection(drawn(Layout.of(CANVAS), part, part, generator, (1, 2), Causal()))
    for lists, other in zip((plan.full, plan.partial), plan.transposed, strict=True):
        there = sorted(tuple(int(x) for x in e) for e in zip(*lists.entries()[:3], strict=True))
        back = sorted((int(u), int(row), int(column)) for u, column, row in zip(*other.entries()[:3], strict=True))
        assert there == back


def test_repeats_count_in_attention(generator: torch.Generator) -> None:
    """A group listed twice adds log 2 to its logits."""
    q, k, v = torch.randn(3, 1, 1, 32, 8, dtype=torch.float64, generator=generator)
    part = Partition.blocks(32, 16)
    times = torch.tensor([[2, 1], [0, 3]])
    selection = from_mask(Layout.of(Canvas((32,))), part, part, times)
    found = attend(q, k, v, selection)
    weight = times.repeat_interleave(16, 0).repeat_interleave(16, 1).double()
    s = q @ k.transpose(-1, -2) / 8**0.5 + weight.log()
    torch.testing.assert_close(found.out, s.softmax(-1) @ v)
    torch.testing.assert_close(found.lse, s.logsumexp(-1))


def test_gradients_reach_what_was_selected(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 2, 12, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    selection = pooled_topk(q, k, Canvas((12,)), 3, 2, within=Causal())
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, selection), (q, k, v), fast_mode=True)


def test_no_pads_no_pattern_means_full_blocks_only(generator: torch.Generator) -> None:
    q, k = torch.randn(2, 2, 3, 64, 8, generator=generator)
    plan = plan_selection(pooled_topk(q, k, Canvas((64,)), 16, 2))
    assert plan.partial.index.shape[-1] == 0 and plan.masks.shape[0] == 0
    assert plan.kept == pytest.approx(0.5)
    assert plan.owner.shape == (2, 3)


def test_pattern_is_compiled_once(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    canvas = Canvas((8, 8))
    part = Partition.blocks(canvas, tile(canvas, (4, 4)))
    first = plan_selection(drawn(Layout.of(canvas), part, part, generator, within=Neighborhood(5)))
    monkeypatch.setattr("glocal.plan.build._build", lambda *_: pytest.fail("compiled again"))
    again = Partition.blocks(canvas, tile(canvas, (4, 4)))
    second = plan_selection(drawn(Layout.of(canvas), again, again, generator, within=Neighborhood(5)))
    assert first.masks is second.masks


def test_another_geometry_is_refused(generator: torch.Generator) -> None:
    q, k, v = torch.randn(3, 1, 1, 16, 4, generator=generator)
    selection = pooled_topk(q, k, Canvas((16,)), 4, 2)
    with pytest.raises(ValueError, match="has 16"):
        attention(q[:, :, :8], k, v, selection)
    with pytest.raises(ValueError, match="lists and groups disagree about the number of heads: \\[2, 3\\]"):
        drawn(
            Layout.of(Canvas((16,))),
            selection.q_part,
            Partition.clusters(torch.zeros(1, 2, 16, dtype=torch.long), 1),
            generator,
            (1, 3),
        )


def test_empty_rows_give_zero(generator: torch.Generator) -> None:
    q, k, v = torch.randn(3, 1, 1, 32, 8, generator=generator)
    part = Partition.blocks(32, 16)
    selection = pooled_topk(q, k, Canvas((32,)), 16, 0)
    found = attend(q, k, v, selection)
    assert found.out.eq(0).all() and found.lse.eq(-torch.inf).all()
    assert Keep(top=0).select(torch.zeros(1, 1, part.groups, part.groups)).index.shape[-1] == 0


@pytest.mark.parametrize("kind", ["repeats", "ragged", "tokens", "pattern", "dedupe"])
def test_the_cpu_backend_equals_the_reference(kind: str, generator: torch.Generator) -> None:
    """Out, LSE and gradients; repeated blocks, pads, lists for each head, grouped heads."""
    n = 48
    layout = Layout.of(Canvas((6, 8)))
    part = Partition.blocks(layout.q, 16 if kind != "pattern" else (3, 4))
    keys = {"ragged": Partition.chunks(torch.tensor([[0, 20, 21, n], [0, 1, 30, n]]))}.get(kind, part)
    keys = Partition.blocks(layout.q, 1) if kind == "tokens" else keys
    within = Neighborhood(5) if kind == "pattern" else None
    selection = drawn(layout, part, keys, generator, (2, 2), within, kind == "dedupe")
    found = []
    data = [torch.randn(2, h, n, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2)]
    weight = torch.randn(2, 4, n, 8, dtype=torch.float64, generator=generator)
    for backend in ("reference", "cpu"):
        q, k, v = (t.clone().requires_grad_() for t in data)
        result = attend(q, k, v, selection, backend=backend)
        loss = (result.out * weight).sum() + torch.where(result.lse.isinf(), 0, result.lse).square().sum()
        loss.backward()
        found.append((result.out, result.lse, q.grad, k.grad, v.grad))
    for name, a, b in zip(("out", "lse", "q", "k", "v"), *found, strict=True):
        torch.testing.assert_close(a, b, msg=lambda words, name=name: f"{name}: {words}")
