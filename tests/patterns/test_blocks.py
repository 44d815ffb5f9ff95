import pytest
import torch

from glocal.canvas import Canvas, Layout, Order, named, per_head_orders, raster, tile
from glocal.patterns import Blocks, Causal, Neighborhood, coarsen, per_head


def random_mask(generator, *shape):
    return torch.rand(*shape, generator=generator) < 0.5


def expand(kept, n, m, q_block, kv_block, offset=0):
    """Token by token."""
    rows = [[bool(kept[(i + offset) // q_block, (j + offset) // kv_block]) for j in range(m)] for i in range(n)]
    return torch.tensor(rows)


@pytest.mark.parametrize(("q_block", "kv_block", "offset"), [(4, 4, 0), (3, 5, 0), (8, 2, 0), (4, 4, 3), (4, 8, 2)])
def test_blocks_are_their_expansion_over_the_whole_sequence(generator, q_block, kv_block, offset):
    canvas = Canvas((3, 5), before=2, after=4)
    n = canvas.size
    nq, nk = -(-(n + offset) // q_block), -(-(n + offset) // kv_block)
    kept = random_mask(generator, nq, nk)
    pattern = Blocks(kept, q_block, kv_block, offset=offset)
    layout = Layout(canvas, canvas, {("before", "*"): "none"})  # blocks answer for text, too
    pattern.check(layout)
    assert torch.equal(pattern.mask(layout)[0], expand(kept, n, n, q_block, kv_block, offset))
    assert pattern.block_mask(layout).shape == (1, nq, nk)
    assert torch.equal((~pattern).mask(layout)[0], ~expand(kept, n, n, q_block, kv_block, offset))


def test_sides_of_different_length_and_slices(generator):
    kept = random_mask(generator, 2, 3, 4)
    layout = Layout(Canvas((9,)), Canvas((14,)), q_start=2, kv_start=5, q_tokens=6)
    pattern = Blocks(kept, 3, 4)
    assert pattern.heads == 2
    got = pattern.mask(layout)
    for head in range(2):
        assert torch.equal(got[head], expand(kept[head], 9, 14, 3, 4)[2:8, 5:])


@pytest.mark.parametrize("order", ["gilbert", "snake", "wh", "tile2x3"])
def test_position_in_the_order_decides_the_block(generator, order):
    canvas = Canvas((4, 6), before=3)
    gather = named(canvas, order).gather
    count = -(-gather.numel() // 6)
    kept = random_mask(generator, count, count)
    where = {int(token): place for place, token in enumerate(gather) if token >= 0}
    want = [[bool(kept[where[i] // 6, where[j] // 6]) for j in range(27)] for i in range(27)]
    for given in (order, named(canvas, order)):
        assert torch.equal(Blocks(kept, 6, 6, given).mask(Layout.of(canvas))[0], torch.tensor(want))


def test_rule_instead_of_a_mask():
    layout = Layout.of(Canvas((11,)))
    pattern = Blocks(lambda i, j, head: (j + (head or 0)) % 3 <= i, 4, 4, rule_heads=2)
    assert pattern.heads == 2
    for head in range(2):
        i, j = torch.arange(3)[:, None], torch.arange(3)[None]
        assert torch.equal(pattern.mask(layout)[head], expand((j + head) % 3 <= i, 11, 11, 4, 4))


def test_key_is_the_content(generator):
    kept = random_mask(generator, 3, 3)
    assert Blocks(kept, 4, 4).key == Blocks(kept.clone(), 4, 4).key
    assert Blocks(kept, 4, 4).key != Blocks(~kept, 4, 4).key
    assert Blocks(kept, 4, 4).key != Blocks(kept, 4, 4, "gilbert").key
    assert Blocks(kept, 4, 4).key != Blocks(kept, 4, 4, offset=1).key
    assert hash(Blocks(kept, 4, 4) & Causal()) is not None


def naive_coarse(seen, block_q, block_k, rule):
    n, m = seen.shape
    rows = []
    for i in range(0, n, block_q):
        row = []
        for j in range(0, m, block_k):
            part = seen[i : i + block_q, j : j + block_k].float().mean().item()
            row.append(part > 0 if rule == "any" else part >= (1.0 if rule == "all" else rule))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("rule", ["any", "all", 0.5])
@pytest.mark.parametrize(("q_block", "kv_block"), [(4, 4), (5, 3)])
def test_coarsen(rule, q_block, kv_block):
    canvas = Canvas((5, 6), before=3)
    pattern = per_head([Neighborhood(3), Causal()])
    layout = Layout(canvas, canvas, {("before", "grid"): "none"})
    blocks = coarsen(pattern, layout, q_block, kv_block, rule)
    seen = pattern.mask(layout)
    for head in range(2):
        want = naive_coarse(seen[head], q_block, kv_block, rule)
        assert torch.equal(blocks.block_mask(layout)[head], want)
    expanded = blocks.mask(layout)
    if rule == "any":
        assert bool((expanded | ~seen).all())
    if rule == "all":
        assert bool((seen | ~expanded).all())


def test_coarsen_on_tiles_ignores_pads():
    canvas = Canvas((5, 7))
    order = tile(canvas, (2, 4))
    whole = coarsen(Neighborhood(5), canvas, 8, 8, "all", order)
    layout = Layout.of(canvas)
    seen = Neighborhood(5).mask(layout)[0]
    for i, rows in enumerate(order.gather.view(-1, 8)):
        for j, columns in enumerate(order.gather.view(-1, 8)):
            part = seen[rows[rows >= 0][:, None], columns[columns >= 0]]
            assert bool(whole.block_mask(layout)[0, i, j]) == bool(part.all())


def test_errors(generator):
    kept = random_mask(generator, 3, 3)
    with pytest.raises(
        ValueError,
        match=r"kept of shape \(1, 3, 3\) does not fit 13 queries and 13 keys in blocks of 4 x 4.*\[heads\|1, 4, 4\]",
    ):
        Blocks(kept, 4, 4).check(Layout.of(Canvas((13,))))
    with pytest.raises(ValueError, match="offset=4 must lie in 0..3"):
        Blocks(kept, 4, 4, offset=4)
    with pytest.raises(ValueError, match="q_block=0, kv_block=4 must be at least 1"):
        Blocks(kept, 0, 4)
    with pytest.raises(ValueError, match=r"must be \[heads\|1, query blocks, key blocks\]"):
        Blocks(kept[0], 4, 4)
    with pytest.raises(ValueError, match="rule='most'; legal: 'any', 'all' or a share"):
        coarsen(Causal(), Canvas((4,)), 2, 2, "most")
    canvas = Canvas((3, 4))
    both = per_head_orders([named(canvas, "gilbert"), raster(canvas)])
    with pytest.raises(ValueError, match=r"differs by head or sample, shape \(2, 12\)"):
        Blocks(kept, 4, 4, both).check(Layout.of(canvas))
    with pytest.raises(ValueError, match="not one-to-one: 1 tokens are missing and 1 repeat"):
        Blocks(kept, 4, 4, Order("twice", torch.tensor([0, 0, *range(2, 12)]))).check(Layout.of(canvas))
    with pytest.raises(ValueError, match="differs by head; give head="):
        two = Blocks(kept.expand(2, 3, 3), 4, 4)
        coords = canvas.coords()
        two.allows(coords, coords, Layout.of(canvas))
