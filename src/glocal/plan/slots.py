"""Places of fixed shape for a plan whose contents change: a compiled model or a CUDA graph reads them at every step.

A graph bakes in shapes, not contents. What is written between steps is seen by the next run, so layers and steps share
one compiled graph however their plans differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glocal.plan.blockplan import BlockLists, BlockPlan
from glocal.plan.facts import CHANGING, declare_order, declare_sound


class PlanSlots:
    """Tensors of one plan, overwritten by `write`. `attention` takes it wherever it takes a BlockPlan.

    like: a plan of the geometry, blocks, number of lists and orders that all contents will have; it is written first.
    most: key blocks a list can hold; None is all key blocks. masks: rows of the mask table; None is those of `like`.
    """

    plan: BlockPlan

    def __init__(self, like: BlockPlan, *, most: int | None = None, masks: int | None = None) -> None:
        width = like.kv_blocks if most is None else most
        rows = like.masks.shape[0] if masks is None else masks
        partial_width = width if rows else 0

        def lists(given: BlockLists, wide: int, mask: bool) -> BlockLists:
            shape = (*given.count.shape, wide)
            index = torch.zeros(shape, dtype=torch.int32, device=like.device)
            return BlockLists(torch.zeros_like(given.count), index, torch.zeros_like(index) if mask else None)

        full, partial = lists(like.full, width, False), lists(like.partial, partial_width, True)
        declare_sound(full, partial, changing=True)
        self.plan = replace(
            like,
            q_order=declare_order(like.q_order.clone(), CHANGING),
            kv_order=declare_order(like.kv_order.clone(), CHANGING),
            full=full,
            partial=partial,
            masks=torch.zeros(rows, *like.masks.shape[1:], dtype=torch.int32, device=like.device),
            owner=like.owner.clone(),
            name=f"slots for {like.name}",
        )
        self.write(like)

    def write(self, plan: BlockPlan) -> PlanSlots:
        """Put the contents of `plan` into the slots; no wait for the device. Returns the slots.

        Raises ValueError for another geometry, other blocks, or more lists, entries or masks than there is room for.
        """
        mine = self.plan
        if (plan.layout.key, plan.q_block, plan.kv_block) != (mine.layout.key, mine.q_block, mine.kv_block):
            raise ValueError(
                f"PlanSlots: {plan.name!r} has {plan.layout.nq} x {plan.layout.nk} tokens in blocks of "
                f"{plan.q_block} x {plan.kv_block}, the slots {mine.layout.nq} x {mine.layout.nk} in blocks of "
                f"{mine.q_block} x {mine.kv_block}; make slots like this plan."
            )
        have, room = plan.tensors(), mine.tensors()
        for name, ours in room.items():
            theirs = have[name]
            grows = name in ("full_index", "part_index", "part_mask", "masks")
            if not grows and not _broadcasts(theirs, ours):
                raise ValueError(_words(name, theirs, ours, "the same shape"))
            if grows and any(a > b for a, b in zip(theirs.shape, ours.shape, strict=True)):
                raise ValueError(_words(name, theirs, ours, "at most that; give the slots a larger most= or masks="))
        for name, ours in room.items():
            theirs = have[name]
            if name in ("full_index", "part_index", "part_mask"):
                ours[..., : theirs.shape[-1]].copy_(theirs)
            elif name == "masks":
                ours[: theirs.shape[0]].copy_(theirs)
            else:
                ours.copy_(theirs)
        return self

    def __repr__(self) -> str:
        layout, most = self.plan.layout, self.plan.full.index.shape[-1]
        return f"PlanSlots({layout.nq} x {layout.nk} tokens, lists of at most {most} blocks)"


def _broadcasts(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.dim() == ours.dim() and all(a in (1, b) for a, b in zip(theirs.shape, ours.shape, strict=True))


def _words(name: str, theirs: Tensor, ours: Tensor, legal: str) -> str:
    return f"PlanSlots: {name} of shape {tuple(theirs.shape)} does not go into {tuple(ours.shape)}; legal: {legal}."
