"""Rectification as the correction of any method of a recipe (Rectified SpaAttn, arXiv 2511.19835).

The softmax over kept blocks is scaled by their mass in full attention, and dropped blocks that their means stand for
come back as mean values. Blocks may be boxes, runs along a curve or along another axis. Words keep their output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal._kept import Seen, ordinary
from glocal.adapt.rectified_spaattn import kept_blocks, least_kept, word_keys
from glocal.canvas import Canvas, Layout, Order
from glocal.ops.epilogue import Epilogue
from glocal.ops.rectify import rectification
from glocal.plan.blockplan import BlockPlan
from glocal.plan.dynamic import plan_blocks
from glocal.routing.keep import Keep
from glocal.routing.partition import Partition
from glocal.routing.shares import Shares, helpful, means, pooled, shares


@dataclass(frozen=True, eq=False)
class Groups:
    """The blocks of one order. whole: all of them; part: those of media tokens, which are number `media` [M] of all;
    words: all other tokens.
    """

    whole: Partition
    part: Partition
    media: Tensor
    words: Tensor


@dataclass(frozen=True, eq=False)
class Looked:
    """What block means say of one call: shares of the mass, and where a mean stands for its block."""

    share: Shares
    good: Tensor


@dataclass(frozen=True, eq=False)
class Rectified:
    """groups: of queries. factor [B, H, groups] and addend [B, H, groups, Dv] of all of them."""

    groups: Groups
    factor: Tensor
    addend: Tensor

    def apply(self, out: Tensor) -> Tensor:
        """The rectified output for out [B, H, N, Dv]."""
        addend = self.addend.to(out.dtype)
        return Epilogue.of_groups(self.groups.whole, out.shape[2], self.factor, addend).apply(out)

    def at(self, block: int, heads: tuple[int, int], out: Tensor) -> Tensor:
        """The rectified rows of a query block for heads `first` to `last` - 1 of sample 0: out [H, R, Dv]."""
        mine = (0, slice(*heads), block)
        return self.factor[mine][:, None, None] * out + self.addend[mine][:, None]


@lru_cache(maxsize=64)
@ordinary()
def groups_of(canvas: Canvas, order: Order, device: str) -> Groups:
    """ValueError where a canvas has no grid or several, or a block holds media tokens and words."""
    if len(canvas.grids) != 1:
        raise ValueError(f"rectification: {canvas!r} has {len(canvas.grids)} grids; legal: one, and text around it.")
    whole = Partition.blocks(canvas, order)
    members = whole.members[0, 0]
    real, media = members >= 0, torch.isin(members, canvas.indices(canvas.grid.name).int())
    if bool((media.any(-1) & (real & ~media).any(-1)).any()):
        raise ValueError(f"rectification: blocks of {canvas!r} hold media tokens and words; use another order.")
    number = media.any(-1).nonzero()[:, 0]
    words = members[real & ~media].long()
    part = Partition(whole.members[:, :, number].to(device), f"media {whole.name}", fixed=True)
    return Groups(whole.to(device), part, number.to(device), words.to(device))


# What was looked at last, by its q and while that lives: a rectified method looks once for its plan and once for its
# factors, and the probe for every such method of a call.
_LAST: WeakIdKeyDictionary = WeakIdKeyDictionary()


def looked_at(q: Tensor, k: Tensor, layout: Layout, groups: Groups, scale: float | None) -> Looked:
    """Block means of a call: q, k [B, H, N, D]; ValueError for fewer key heads than query heads."""
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if graph or q.is_inference() or k.is_inference() or torch.compiler.is_compiling():  # not told when they change
        return _looked_at(q, k, layout, groups, scale)
    key = (layout, groups, scale)
    known = _LAST.get(q)
    if known is not None and known[0].still((q, k)) and known[1] == key:
        return known[2]
    looked = _looked_at(q, k, layout, groups, scale)
    _LAST.clear()
    _LAST[q] = (Seen.of((q, k)), key, looked)
    return looked


def _looked_at(q: Tensor, k: Tensor, layout: Layout, groups: Groups, scale: float | None) -> Looked:
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"rectification: {q.shape[1]} query heads and {k.shape[1]} key heads; legal: as many of both.")
    mine, theirs = pooled(q, groups.part), pooled(k, groups.part)
    return Looked(shares(mine, theirs, word_keys(k, groups.words, layout), scale), helpful(mine, theirs))


def rectified(looked: Looked, v: Tensor, plan: BlockPlan, groups: Groups) -> Rectified:
    """Factor and addend of every query block; a block that the plan shows in part counts as kept. v [B, H, N, Dv]."""
    if (plan.q_blocks, plan.kv_blocks) != (groups.whole.groups,) * 2:
        raise ValueError(
            f"rectification: a plan of {plan.q_blocks} x {plan.kv_blocks} blocks does not have the "
            f"{groups.whole.groups} blocks of {groups.whole!r}."
        )
    kept = listed(plan)[:, :, groups.media[:, None], groups.media[None]].expand(looked.good.shape)
    factor, addend = rectification(looked.share, kept, looked.good, means(v, groups.part))
    all_factors = factor.new_ones(*factor.shape[:2], groups.whole.groups)
    all_addends = addend.new_zeros(*all_factors.shape, addend.shape[-1])
    all_factors[:, :, groups.media], all_addends[:, :, groups.media] = factor, addend
    return Rectified(groups, all_factors, all_addends)


def listed(plan: BlockPlan) -> Tensor:
    """Which key blocks each query block reads, in full or in part, bool [B|1, H|1, query blocks, key blocks]."""
    seen = torch.zeros(plan.full.count.shape[0], plan.q_blocks, plan.kv_blocks, device=plan.device)
    for lists in (plan.full, plan.partial):
        seen.scatter_add_(-1, lists.index.long(), lists.live.float())
    return (seen > 0)[plan.owner.long()]


@dataclass(frozen=True, eq=False)
class BestShares:
    """The router of Rectified SpaAttn: blocks whose reallocated shares are largest; words compete as one column, and
    see and are seen by everything. drop: share of media blocks dropped at most; mass: as many of the best as hold it.
    """

    order: Order
    drop: float
    mass: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"rectified_spaattn: drop={self.drop}; legal: from 0 (dense), below 1.")

    def plan(self, q: Tensor, k: Tensor, layout: Layout, scale: float | None) -> BlockPlan:
        """The plan of a call; q, k [B, H, N, D]."""
        groups = groups_of(layout.kv, self.order, str(q.device))
        share = looked_at(q, k, layout, groups, scale).share
        kept = self.kept(share, groups)
        mask = kept.new_ones(*kept.shape[:2], groups.whole.groups, groups.whole.groups)
        mask[:, :, groups.media[:, None], groups.media[None]] = kept
        return plan_blocks(mask, layout, groups.whole, groups.whole)

    def kept(self, share: Shares, groups: Groups) -> Tensor:
        """Media blocks that the query blocks of `share` keep, bool [B, H, query blocks, media blocks]."""
        keep = Keep(mass=self.mass, crossing="in", at_least=max(1, least_kept(self.drop, groups.part.groups)))
        return kept_blocks(keep, share)
