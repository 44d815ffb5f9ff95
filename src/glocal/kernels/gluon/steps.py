"""Partial entries by key block, cut into the steps of the backward kernel; steps without a visible pair are left out.

A partial block of a neighbourhood often has quarters that nobody sees, and quarters that need no mask. The codes tell.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal._kept import Seen
from glocal.kernels.call import PlanTensors
from glocal.kernels.triton.lists import Turned, by_key
from glocal.plan.blockplan import BlockLists, unpack
from glocal.plan.facts import capturing

PARTS = 2  # of the keys of a block, at most, one a warp group
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def steps(plan: PlanTensors, blocks: tuple[int, int], tile: int, keys: int) -> Turned:
    """Steps of `tile` queries by key block: `index` counts tiles of queries, `mask` holds codes.

    A code is 16 times the number of the step in the mask table, cut into tiles of queries, plus two bits for each
    part of `keys` keys: bit p, some pair is visible; bit 2 + p, all are. blocks: queries and keys of a block. Made once
    for each plan unless it changes; no wait for the device.
    """
    anew = capturing(plan.owner)
    mark, tensors = (blocks, tile, keys), (plan.part_count, plan.part_index, plan.part_mask, plan.masks)
    known = None if anew else _KNOWN.get(plan.part_index)
    if known is not None and known[0] == mark and known[1].still(tensors):
        return known[2]
    found = _steps(plan, blocks, tile, keys)
    if not anew:
        _KNOWN[plan.part_index] = (mark, Seen.of(tensors), found)
    return found


def _steps(plan: PlanTensors, blocks: tuple[int, int], tile: int, keys: int) -> Turned:
    subs, index, kv_blocks = blocks[0] // tile, plan.part_index, plan.kv_order.shape[-1] // blocks[1]
    code = codes(plan.masks, blocks, tile, keys)  # [M, subs]
    live = BlockLists(plan.part_count, index).live  # [U, query blocks, most]
    mask = torch.where(live, plan.part_mask, 0).long()
    if code.shape[0] == 0:
        code = code.new_zeros(1, subs)
    mine = code[mask].movedim(-1, 2).flatten(1, 2)  # [U, query tiles, most]
    wide = index.repeat_interleave(subs, 1)
    return by_key(live.repeat_interleave(subs, 1) & (mine % 4 > 0), wide, mine, kv_blocks)


def codes(masks: Tensor, blocks: tuple[int, int], tile: int, keys: int) -> Tensor:
    """Code of each tile of queries of each mask, int32 [M, q_block / tile]."""
    m, (rows, columns) = masks.shape[0], blocks
    seen = unpack(masks, columns).reshape(m, rows // tile, tile, columns // keys, keys)
    some, every = seen.any(4).any(2), seen.all(4).all(2)  # [M, subs, parts]
    bit = 1 << torch.arange(columns // keys, device=masks.device)
    number = torch.arange(m * (rows // tile), device=masks.device).reshape(m, rows // tile)
    return (number * 16 + ((some + (1 << PARTS) * every) * bit).sum(-1)).int()
