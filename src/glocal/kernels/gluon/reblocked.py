"""Plans in other blocks, where that pays: neighbouring query blocks joined, key blocks cut in halves.

Query blocks in pairs: where two visit nearly the same key blocks, two groups of 64 rows share every tile of keys, which
halves what is read: strided shards (arXiv 2407.17678) and other causal plans of 64-token blocks are like that. What one
half visits alone is hidden from the other by a mask.

Key blocks in halves: half of a partial block is often one that no query of the block sees, or that all see whole. A
step of the kernel takes any two halves.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glocal.kernels.call import PlanTensors
from glocal.plan.blockplan import BlockLists

MORE = 1.1  # visited pairs after joining, of those before, up to which it pays
FEWER = 0.98  # the same after cutting
_MOST = 1 << 27  # entries of the table of all block pairs, four bytes each while it is made


def paired(plan: PlanTensors, kv_block: int) -> PlanTensors | None:
    """The plan with query blocks twice as long, or None where that does not pay. Waits for the device."""
    lists, rows = plan.full_count.shape
    columns, masks = plan.kv_order.shape[-1] // kv_block, plan.masks.shape[0]
    if rows % 2 or lists * rows * columns > _MOST:
        return None
    state = _states(plan, columns)  # [U, query blocks, key blocks]
    if state is None:
        return None
    upper, lower = state[:, ::2], state[:, 1::2]  # [U, pairs, key blocks]
    seen = (upper >= 0) | (lower >= 0)
    if 2 * int(seen.sum()) > MORE * int((state >= 0).sum()):
        return None
    full = (upper == masks) & (lower == masks)
    part = seen & ~full
    upper, lower = (torch.where(half < 0, masks + 1, half) for half in (upper, lower))
    codes, which = torch.unique(upper[part].long() * (masks + 2) + lower[part], return_inverse=True)
    row = torch.zeros_like(state[:, ::2], dtype=torch.int32)
    row[part] = which.int()
    words = torch.cat([plan.masks, plan.masks.new_full((1, *plan.masks.shape[1:]), -1),
                       plan.masks.new_zeros(1, *plan.masks.shape[1:])])  # fmt: skip
    both = torch.cat([words[codes // (masks + 2)], words[codes % (masks + 2)]], 1)  # [masks, 2 * rows, words]
    return _listed(plan, full, part, row, both)


def halved(plan: PlanTensors, kv_block: int) -> PlanTensors | None:
    """The plan with key blocks half as long, or None where that does not pay. Waits for the device."""
    lists, rows = plan.full_count.shape
    columns, masks = plan.kv_order.shape[-1] // kv_block, plan.masks.shape[0]
    if not masks or lists * rows * columns > _MOST // 2:
        return None
    state = _states(plan, columns)
    if state is None:
        return None
    halves = plan.masks.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)  # [2 * masks, rows, words]
    words, which = torch.unique(halves, dim=0, return_inverse=True)
    kind = torch.where((words == -1).flatten(1).all(1), len(words), torch.arange(len(words), device=words.device))
    kind = torch.where((words == 0).flatten(1).all(1), -1, kind)
    codes = torch.nn.functional.pad(kind[which].view(-1, 2), (0, 0, 0, 1), value=len(words))  # the last for full ones
    halved = torch.where(state[..., None] < 0, -1, codes[state.clamp(min=0).long()]).flatten(2)
    if int((halved >= 0).sum()) > FEWER * 2 * int((state >= 0).sum()):
        return None
    full = halved == len(words)
    return _listed(plan, full, (halved >= 0) & ~full, halved.clamp(min=0).int(), words.contiguous())


def _listed(plan: PlanTensors, full: Tensor, part: Tensor, row: Tensor, masks: Tensor) -> PlanTensors:
    """The plan with the lists of tables [U, query blocks, key blocks]; row: numbers in `masks`."""
    whole, partial = BlockLists.from_dense(full), BlockLists.from_dense(part, row)
    assert partial.mask is not None
    return replace(
        plan,
        full_count=whole.count,
        full_index=whole.index,
        part_count=partial.count,
        part_index=partial.index,
        part_mask=partial.mask,
        masks=masks,
    )


def _states(plan: PlanTensors, columns: int) -> Tensor | None:
    """Mask of each block pair, int32: the number of masks where all is seen, -1 where none; None if blocks repeat."""
    lists, rows = plan.full_count.shape
    state = torch.full((lists, rows, columns), -1, dtype=torch.int32, device=plan.owner.device)
    total = 0
    for listed, rest in (
        (BlockLists(plan.full_count, plan.full_index), plan.masks.shape[0]),
        (BlockLists(plan.part_count, plan.part_index, plan.part_mask), 0),
    ):
        u, row, column, mask = listed.entries()
        state[u, row, column] = (torch.full_like(u, rest) if mask is None else mask).int()
        total += u.numel()
    return state if int((state >= 0).sum()) == total else None
