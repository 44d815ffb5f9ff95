"""Plans in other blocks, where that pays: query or key blocks joined in pairs, key blocks cut in halves.

Query blocks in pairs: where two visit nearly the same key blocks, two groups of 64 rows share every tile of keys, which
halves what is read: strided shards (arXiv 2407.17678) and other causal plans of 64-token blocks are like that. What one
half visits alone is hidden from the other by a mask.

Key blocks in pairs, for backward: two groups of 64 keys share every tile of queries, and one pass of five products
makes all gradients in the place of two of seven. Keys of a stride, which many queries see, are joined with one another.

Key blocks in halves: half of a partial block is often one that no query of the block sees, or that all see whole. A
step of the kernel takes any two halves.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glocal.kernels.call import PlanTensors
from glocal.plan.blockplan import BlockLists
from glocal.plan.facts import OrderFacts, declare_order

MORE = 1.1  # visited pairs after joining, of those before, up to which it pays
MORE_BACKWARD = 1.25
FEWER = 0.98  # the same after cutting
CROWD = 32  # pairs of key blocks of a stride, all seen by the same queries, up to which one pass is faster
_LONG = 2  # times as many queries as a key block has on average, from which its keys are those of a stride
_MOST = 1 << 27  # entries of the table of all block pairs, four bytes each while it is made


def paired(plan: PlanTensors, kv_block: int) -> PlanTensors | None:
    """The plan with query blocks twice as long, or None where that does not pay. Waits for the device."""
    rows = plan.full_count.shape[1]
    state = None if rows % 2 else _states(plan, plan.kv_order.shape[-1] // kv_block)
    return None if state is None else _joined(plan, (state[:, ::2], state[:, 1::2]), 1, MORE)


def halved(plan: PlanTensors, kv_block: int) -> PlanTensors | None:
    """The plan with key blocks half as long, or None where that does not pay. Waits for the device."""
    masks = plan.masks.shape[0]
    state = _states(plan, plan.kv_order.shape[-1] // kv_block, _MOST // 2) if masks else None
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


def paired_keys(plan: PlanTensors, kv_block: int, kv_heads: int, facts: OrderFacts) -> PlanTensors | None:
    """The plan with key blocks twice as long, for backward; None where that does not pay, or where pairs differ by head
    and heads of the plan are not those of keys. `facts` hold of `kv_order`, which may become another one.
    """
    columns = plan.kv_order.shape[-1] // kv_block
    state = None if columns % 2 else _states(plan, columns)
    if state is None:
        return None
    seen = (state >= 0).sum(1)  # [U, key blocks]
    long = seen > _LONG * seen.float().mean(-1, keepdim=True)
    if int(long.sum(-1).max()) > 2 * CROWD:
        return None
    place = long.int().argsort(dim=-1, stable=True)
    by_place = state.gather(2, place[:, None].expand_as(state))
    found = _joined(plan, (by_place[..., ::2], by_place[..., 1::2]), 2, MORE_BACKWARD)
    if found is None or bool((place == torch.arange(columns, device=place.device)).all()):
        return found
    if not {plan.owner.shape[1], plan.kv_order.shape[1]} <= {1, kv_heads}:
        return None
    order, mine = plan.kv_order.unflatten(-1, (-1, kv_block)), place[plan.owner.long()]  # [b, h, key blocks(, tokens)]
    many = [max(a, b) for a, b in zip(order.shape[:2], mine.shape[:2], strict=True)]
    order, mine = order.expand(*many, -1, -1), mine.expand(*many, -1)
    order = order.gather(2, mine[..., None].expand_as(order)).flatten(2)
    return replace(found, kv_order=declare_order(order, replace(facts, identity=False)))


def _joined(plan: PlanTensors, halves: tuple[Tensor, Tensor], side: int, more: float) -> PlanTensors | None:
    """The plan of pairs with halves [U, query blocks, key blocks] as `_states` has them; masks join along `side`."""
    upper, lower = halves
    seen, masks = (upper >= 0) | (lower >= 0), plan.masks.shape[0]
    if 2 * int(seen.sum()) > more * sum(int((half >= 0).sum()) for half in halves):
        return None
    full = (upper == masks) & (lower == masks)
    part = seen & ~full
    upper, lower = (torch.where(half < 0, masks + 1, half) for half in halves)
    codes, which = torch.unique(upper[part].long() * (masks + 2) + lower[part], return_inverse=True)
    row = torch.zeros_like(upper, dtype=torch.int32)
    row[part] = which.int()
    words = torch.cat([plan.masks, plan.masks.new_full((1, *plan.masks.shape[1:]), -1),
                       plan.masks.new_zeros(1, *plan.masks.shape[1:])])  # fmt: skip
    both = torch.cat([words[codes // (masks + 2)], words[codes % (masks + 2)]], side)
    return _listed(plan, full, part, row, both)


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


def _states(plan: PlanTensors, columns: int, most: int = _MOST) -> Tensor | None:
    """Mask of each block pair, int32: the number of masks where all is seen, -1 where none.

    None if blocks repeat or the table would be too large.
    """
    lists, rows = plan.full_count.shape
    if lists * rows * columns > most:
        return None
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
