"""What routers and rectification say of some query blocks of a call: the probe needs no more of them than that.

A router's map over all blocks is quadratic in their number, and there are as many maps as heads and candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.adapt.records import SiteCall
from glocal.adapt.rectified_spaattn import word_keys
from glocal.advise.correction import BestShares, Groups, groups_of, listed
from glocal.advise.methods import MethodSpec
from glocal.ops.rectify import rectification
from glocal.plan.blockplan import BlockPlan
from glocal.plan.dynamic import plan_blocks
from glocal.plan.selection import plan_selection
from glocal.routing.route import PooledTopK
from glocal.routing.shares import Pooled, Shares, helpful, means, pooled, shares


@dataclass(frozen=True, eq=False)
class Blocks:
    """How queries and keys are cut: as of `BlockPlan`."""

    q_order: Tensor
    kv_order: Tensor
    q_block: int
    kv_block: int

    @property
    def q_blocks(self) -> int:
        """Query blocks."""
        return self.q_order.shape[-1] // self.q_block

    @property
    def kv_blocks(self) -> int:
        """Key blocks."""
        return self.kv_order.shape[-1] // self.kv_block

    @staticmethod
    def of(plan: BlockPlan) -> Blocks:
        """Of a plan, without its lists."""
        return Blocks(plan.q_order, plan.kv_order, plan.q_block, plan.kv_block)

    def same(self, other: Blocks) -> bool:
        """Whether both cut queries and keys alike."""
        if (self.q_block, self.kv_block) != (other.q_block, other.kv_block):
            return False
        pairs = (self.q_order, other.q_order), (self.kv_order, other.kv_order)
        return all(a is b or torch.equal(a, b) for a, b in pairs)  # a look waits for the device


def router_blocks(method: MethodSpec, call: SiteCall, device: torch.device) -> Blocks | None:
    """The blocks of a router that can be asked for some query blocks alone; None for any other method."""
    if method.kind != "route":
        return None
    router = method.router(call.layout)
    if isinstance(router, PooledTopK):
        parts = router.parts(call.layout)
    elif isinstance(router, BestShares):
        parts = (groups_of(call.layout.kv, router.order, str(device)).whole,) * 2
    else:
        return None
    mine, theirs = (part.to(device).members.flatten(2) for part in parts)
    return Blocks(mine, theirs, parts[0].most, parts[1].most)


@dataclass(frozen=True, eq=False)
class LookedRows:
    """What block means say of some query blocks. media: which of these hold media tokens; share, good: of those, as in
    `correction.Looked`. values: mean values of key blocks.
    """

    groups: Groups
    media: Tensor
    share: Shares
    good: Tensor
    values: Tensor


class RouterRows:
    """Routers and rectification at query blocks `numbers` of one call: q, k, v [B, H, N, D]."""

    def __init__(self, qkv: tuple[Tensor, Tensor, Tensor], call: SiteCall, numbers: Tensor) -> None:
        self.qkv, self.call, self.numbers = qkv, call, numbers
        self.looked: dict[int, LookedRows] = {}

    def plan(self, method: MethodSpec) -> BlockPlan:
        """The plan of a router whose query blocks are these alone; ValueError as of `MethodSpec.plan`."""
        q, k, _ = self.qkv
        layout = self.call.layout
        router = method.router(layout)
        if isinstance(router, PooledTopK):
            return plan_selection(router.select(q, k, layout, rows=self.numbers), device=q.device)
        assert isinstance(router, BestShares)
        found = self.look(method)
        kept = router.kept(found.share, found.groups)
        every = found.groups.whole.groups
        mask = kept.new_ones(*kept.shape[:2], len(self.numbers), every)
        mask[:, :, found.media[:, None], found.groups.media[None]] = kept
        return plan_blocks(mask, layout, found.groups.whole.some(self.numbers), found.groups.whole)

    def look(self, method: MethodSpec) -> LookedRows:
        """Block means of the call on the method's blocks, looked at once."""
        q, k, v = self.qkv
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"rectification: {q.shape[1]} query heads and {k.shape[1]} key heads; legal: as many of both."
            )
        layout, scale = self.call.layout, self.call.site.scale
        groups = groups_of(layout.kv, method.orders(layout.kv), str(q.device))
        if id(groups) not in self.looked:
            place = torch.searchsorted(groups.media, self.numbers).clamp(max=len(groups.media) - 1)
            media = (groups.media[place] == self.numbers).nonzero()[:, 0]
            mine, theirs = pooled(q, groups.part), pooled(k, groups.part)
            own = place[media]
            rows = Pooled(mine.mean[:, :, own], mine.spread[:, :, own], mine.counts[own])
            share = shares(rows, theirs, word_keys(k, groups.words, layout), scale)
            values = means(v, groups.part)
            self.looked[id(groups)] = LookedRows(groups, media, share, helpful(rows, theirs), values)
        return self.looked[id(groups)]

    def rectified(self, method: MethodSpec, plan: BlockPlan, *, whole: bool) -> RectifiedRows | None:
        """What is done to the output at these rows; None without correction. whole: the plan has all query blocks."""
        if method.correction == "none":
            return None
        found = self.look(method)
        seen = listed(plan)
        mine = (self.numbers if whole else torch.arange(len(self.numbers), device=seen.device))[found.media]
        kept = seen[:, :, mine[:, None], found.groups.media[None]].expand(found.good.shape)
        factor, addend = rectification(found.share, kept, found.good, found.values)
        rows = len(self.numbers)
        factors = factor.new_ones(*factor.shape[:2], rows)
        addends = addend.new_zeros(*factors.shape, addend.shape[-1])
        factors[:, :, found.media], addends[:, :, found.media] = factor, addend
        return RectifiedRows(factors, addends)


@dataclass(frozen=True, eq=False)
class RectifiedRows:
    """factor [B, H, blocks] and addend [B, H, blocks, Dv] of some query blocks."""

    factor: Tensor
    addend: Tensor

    def at(self, place: int, heads: tuple[int, int], out: Tensor) -> Tensor:
        """The rectified rows of the block at `place` for heads `first` to `last` - 1 of sample 0: out [H, R, Dv]."""
        mine = (0, slice(*heads), place)
        return self.factor[mine][:, None, None] * out + self.addend[mine][:, None]


def shares_seen(plan: BlockPlan) -> tuple[float, float]:
    """Shares of pairs that some query blocks of a plan see and visit, over the rows that they have."""
    rows = float((plan.q_order[0, 0] >= 0).sum())
    pairs = max(1.0, rows * plan.layout.nk)
    return plan.visible_pairs / pairs, plan.visited_pairs / pairs
