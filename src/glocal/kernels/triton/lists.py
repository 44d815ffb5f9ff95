"""What the kernels need beside the plan itself: checked lists, lists the other way round, slots of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal._kept import Seen
from glocal.kernels._jobs import _check
from glocal.kernels.call import PlanTensors
from glocal.plan.blockplan import BlockLists
from glocal.plan.facts import capturing, declared_sound, declared_turned

# Plans whose lists were checked, and their lists by key block, by the tensor of their full lists.
_CHECKED: WeakIdKeyDictionary = WeakIdKeyDictionary()
_TURNED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots of each token: `slots` int32 [b, h, room], by token; `starts` int32 [b, h, n + 1]; b, h of the order."""

    slots: Tensor
    starts: Tensor

    @staticmethod
    def of(order: Tensor, n: int) -> Slots:
        """From an order [b, h, room] over n tokens; no wait for the device."""
        token = torch.where(order < 0, n, order)
        slots = token.argsort(dim=-1, stable=True)
        edges = torch.arange(n + 1, device=order.device, dtype=order.dtype).expand(*order.shape[:2], n + 1)
        starts = torch.searchsorted(token.gather(-1, slots).contiguous(), edges.contiguous(), out_int32=True)
        return Slots(slots.int(), starts)


@dataclass(frozen=True, eq=False)
class Turned:
    """Query blocks of each key block, in rising order; repeats stay. With e = u * key blocks + j, key block j of list u
    has `count[e]` entries from `index[begin[e]]` on. mask: rows of the mask table, like index.
    """

    begin: Tensor
    count: Tensor
    index: Tensor
    mask: Tensor | None


def check(plan: PlanTensors, blocks: tuple[int, int]) -> None:
    """Raise ValueError for block or mask numbers that point nowhere; once for each plan, unless it is changed.

    Lists that were made on the device are declared sound by whoever made them and are not looked at: that would wait.
    """
    if declared_sound(plan.full_count, plan.full_index, plan.part_count, plan.part_index, plan.part_mask):
        return
    mark = (blocks, plan.kv_order.shape[-1], plan.masks.shape[0])
    known = _CHECKED.get(plan.full_index)
    if known is not None and known[0] == mark and known[1].still(_lists(plan)):
        return
    _check(plan, blocks)
    _CHECKED[plan.full_index] = (mark, Seen.of(_lists(plan)))


def turned(plan: PlanTensors, kv_blocks: int) -> tuple[Turned, Turned]:
    """Full and partial lists by key block. Made once for each plan unless it changes; no wait for the device."""
    made = declared_turned(plan.full_index)
    if made is not None and plan.part_index.shape[-1] == 0:
        none = plan.full_index.new_zeros(0)
        every = torch.arange(made[0].numel(), dtype=torch.int32, device=none.device) * made[1].shape[-1]
        return Turned(every, made[0], made[1], None), Turned(every, torch.zeros_like(made[0]), none, none)
    anew = capturing(plan.owner)
    known = None if anew else _TURNED.get(plan.full_index)
    if known is not None and known[0] == kv_blocks and known[1].still(_lists(plan)):
        return known[2]
    found = (
        _turn(plan.full_count, plan.full_index, None, kv_blocks),
        _turn(plan.part_count, plan.part_index, plan.part_mask, kv_blocks),
    )
    if not anew:
        _TURNED[plan.full_index] = (kv_blocks, Seen.of(_lists(plan)), found)
    return found


def _turn(count: Tensor, index: Tensor, mask: Tensor | None, kv_blocks: int) -> Turned:
    return by_key(BlockLists(count, index).live, index, mask, kv_blocks)


def by_key(live: Tensor, index: Tensor, mask: Tensor | None, kv_blocks: int) -> Turned:
    """Turned lists of the live entries of `index` [lists, rows, most], whose values are key blocks; no wait."""
    lists, rows, most = index.shape
    first = torch.arange(lists, device=index.device)[:, None, None] * kv_blocks
    key = torch.where(live, index + first, lists * kv_blocks).flatten()  # [U * rows * most]
    order = key.argsort(stable=True)
    edges = torch.arange(lists * kv_blocks + 1, device=index.device)
    ends = torch.searchsorted(key[order], edges, out_int32=True)
    begin = ends[:-1].contiguous()
    row = torch.arange(rows, device=index.device, dtype=torch.int32)[None, :, None].expand(lists, rows, most)
    return Turned(begin, ends.diff(), row.flatten()[order], None if mask is None else mask.flatten()[order])


def _lists(plan: PlanTensors) -> tuple[Tensor, ...]:
    return plan.full_count, plan.full_index, plan.part_count, plan.part_index, plan.part_mask
