"""What holds for a plan whatever the inputs are: looked at once, kept as long as the plan lives.

Looking means waiting for the device, which is not possible while a CUDA graph is captured: run once before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal.kernels.call import PlanTensors
from glocal.kernels.triton.lists import check

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Facts:
    """q_lies, kv_lies: tokens lie in plan order already (a tail of pads aside).

    once: every query has at most one slot. every: every query has a slot. masked: there are partial blocks.
    even: all query blocks visit equally many key blocks. padded: a fully visible key block may hold pads.
    """

    q_lies: bool
    kv_lies: bool
    once: bool
    every: bool
    masked: bool
    even: bool
    padded: bool


def facts(plan: PlanTensors, blocks: tuple[int, int], nq: int, nk: int) -> Facts:
    """Checks the lists (ValueError) and looks at the orders, once for each plan unless its tensors change."""
    mark = (blocks, nq, nk, *(_version(getattr(plan, name)) for name in plan.__dataclass_fields__))
    known = _KNOWN.get(plan.full_index)
    if known is None or known[0] != mark:
        check(plan, blocks)
        known = (mark, _look(plan, blocks, nq, nk))
        _KNOWN[plan.full_index] = known
    return known[1]


def _look(plan: PlanTensors, blocks: tuple[int, int], nq: int, nk: int) -> Facts:
    times = torch.zeros(*plan.q_order.shape[:2], nq + 1, dtype=torch.int32, device=plan.q_order.device)
    slots = torch.where(plan.q_order < 0, nq, plan.q_order).long()
    times.scatter_add_(2, slots, torch.ones_like(slots, dtype=torch.int32))
    times = times[..., :nq]
    visits = plan.full_count + plan.part_count
    hidden = (plan.kv_order < 0).reshape(*plan.kv_order.shape[:2], -1, blocks[1]).any(-1)  # [b, h, key blocks]
    at = plan.full_index.clamp(0, max(0, hidden.shape[-1] - 1)).long()
    live = torch.arange(at.shape[-1], device=at.device) < plan.full_count[..., None]
    any_hidden = hidden.flatten(0, 1).any(0)
    padded = bool((any_hidden[at] & live).any()) if at.numel() and any_hidden.numel() else False
    return Facts(
        q_lies=_lies(plan.q_order, nq),
        kv_lies=_lies(plan.kv_order, nk),
        once=bool((times <= 1).all()),
        every=bool((times >= 1).all()),
        masked=bool((plan.part_count > 0).any()),
        even=bool((visits == visits.flatten()[0]).all()) if visits.numel() else True,
        padded=padded,
    )


def _lies(order: Tensor, n: int) -> bool:
    slot = torch.arange(order.shape[-1], device=order.device)
    return order.shape[:2] == (1, 1) and bool((order == torch.where(slot < n, slot, -1)).all()) and slot.numel() >= n


def _version(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version
