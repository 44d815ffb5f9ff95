import pytest
import torch

from glocal.canvas import Canvas, Layout, named
from glocal.patterns import (
    Axial,
    Blocks,
    Causal,
    CausalWindow,
    Dense,
    Grid,
    Neighborhood,
    RadialBlocks,
    RadialTokens,
    Sinks,
    TileWindows,
    Windows,
    frame,
    per_head,
)

CANVAS = Canvas((4, 5), before=2, after=3)
POLICY = {("before", "*"): "none", ("grid", "after"): "causal", ("after", "before"): "none"}
LAYOUT = Layout(CANVAS, CANVAS, POLICY)  # type: ignore[arg-type]
GRID = slice(2, 22)
GRID_PATTERNS = [
    Dense(),
    Neighborhood(3),
    Windows(2, roll=1),
    Windows(count=2, roll=1, masked=False),
    Grid(2),
    Axial(0),
    Causal(),
    CausalWindow(4),
    Sinks(3),
    frame(0),
    TileWindows(2, 1),
    RadialTokens(),
]


def outside(mask):
    mask = mask.clone()
    mask[..., GRID, GRID] = False
    return mask


@pytest.mark.parametrize("a", GRID_PATTERNS, ids=repr)
@pytest.mark.parametrize("b", [Neighborhood(3), Causal()], ids=repr)
def test_algebra_is_set_algebra_and_never_touches_policy(a, b):
    policy = outside(Dense().mask(LAYOUT))
    ma, mb = a.mask(LAYOUT), b.mask(LAYOUT)
    for joined, want in ((a | b, ma | mb), (a & b, ma & mb), (~a, ~ma), (~(a | b), ~(ma | mb)), (a & ~b, ma & ~mb)):
        got = joined.mask(LAYOUT)
        assert torch.equal(got[..., GRID, GRID], want[..., GRID, GRID])
        assert torch.equal(outside(got), policy)


def test_policy_decides_text():
    mask = Dense().mask(LAYOUT)[0]
    assert not bool(mask[:2].any())  # text before sees nobody
    assert not bool(mask[GRID, 22:].any())  # causal: text behind the grid comes later
    assert bool(mask[22:, 22:].all()) and bool(mask[22:, GRID].all()) and not bool(mask[22:, :2].any())


def test_per_head():
    pattern = per_head([Dense(), Causal(), ~Causal() | Axial(0)])
    assert pattern.heads == 3
    mask = pattern.mask(LAYOUT)
    for head, one in enumerate([Dense(), Causal(), ~Causal() | Axial(0)]):
        assert torch.equal(mask[head], one.mask(LAYOUT)[0])
    joined = pattern & Neighborhood(3)
    assert joined.heads == 3
    assert torch.equal(joined.mask(LAYOUT), pattern.mask(LAYOUT) & Neighborhood(3).mask(LAYOUT))


@pytest.mark.parametrize("pattern", [*GRID_PATTERNS, Neighborhood(3) | ~Causal()], ids=repr)
def test_patterns_are_hashable_and_equal_by_value(pattern):
    assert hash(pattern.key) == hash(pattern.key)
    assert {pattern: 1}[pattern] == 1


def test_heads_must_agree():
    with pytest.raises(ValueError, match=r"different head counts \[2, 3\] cannot be joined"):
        _ = per_head([Dense()] * 2) | per_head([Dense()] * 3)
    with pytest.raises(ValueError, match="needs at least one pattern, none of which is per head"):
        per_head([per_head([Dense()])])
    with pytest.raises(ValueError, match="differs by head; give head="):
        per_head([Dense()]).of(None)


def test_patterns_on_different_orders_cannot_be_joined():
    kept = torch.ones(5, 5)
    a, b = (Blocks(kept, 4, 4, order) for order in ("gilbert", "snake"))
    with pytest.raises(ValueError, match="different orders cannot be joined: 'gilbert', 'snake'"):
        _ = a & b
    c = Blocks(kept, 4, 4, named(Canvas((4, 5)), "hw"))
    with pytest.raises(ValueError, match="different orders cannot be joined: 'gilbert', 'hw/1@grid'"):
        _ = (a | Causal()) & ~c
    with pytest.raises(ValueError, match="different orders cannot be joined: 'raster', 'gilbert'"):
        _ = RadialBlocks(4) | a
    assert (a | a).order == "gilbert"
    assert (a & Neighborhood(3)).order == "gilbert"
