"""What the kernels need beside the plan itself: checked lists, lists the other way round, slots of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal.kernels._jobs import _check
from glocal.kernels.call import PlanTensors
from glocal.plan.blockplan import BlockLists

# Plans whose lists were checked, by the tensor of their full lists: looking at them costs a wait for the device.
_CHECKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


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


def check(plan: PlanTensors, blocks: tuple[int, int]) -> None:
    """Raise ValueError for block or mask numbers that point nowhere; once for each plan, unless it is changed."""
    mark = (blocks, plan.kv_order.shape[-1], plan.masks.shape[0], *map(_version, _lists(plan)))
    known = _CHECKED.get(plan.full_index)
    if known is not None and known == mark:
        return
    _check(plan, blocks)
    _CHECKED[plan.full_index] = mark


def transposed(plan: PlanTensors, blocks: tuple[int, int]) -> tuple[BlockLists, BlockLists]:
    """Full and partial lists by key block: the query blocks that see it, in rising order; repeats stay."""
    kv_blocks = plan.kv_order.shape[-1] // blocks[1]
    out = []
    for lists in (
        BlockLists(plan.full_count, plan.full_index),
        BlockLists(plan.part_count, plan.part_index, plan.part_mask),
    ):
        u, row, column, mask = lists.entries()
        out.append(BlockLists.from_entries((lists.count.shape[0], kv_blocks), u, column, row, mask))
    return out[0], out[1]


def _lists(plan: PlanTensors) -> tuple[Tensor, ...]:
    return plan.full_count, plan.full_index, plan.part_count, plan.part_index, plan.part_mask


def _version(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version
