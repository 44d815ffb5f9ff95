"""Row lists of block masks, as block-sparse kernels read them (S2-Attention, arXiv 2407.17678)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLists:
    """Key blocks of every query block, for every head.

    crow: int32 [heads, rows + 1], where each row starts in `col`.
    col: int32 [heads, most entries of a head], -1 pads.
    lead: for merged rows, int32 like `col`: how many leading query tokens of the row may use the block (0 pads).
    """

    crow: Tensor
    col: Tensor
    lead: Tensor | None = None


def row_lists(mask: Tensor, lead: Tensor | None = None) -> RowLists:
    """The lists of a bool mask [heads, rows, columns]; `lead` int [heads, rows, columns] travels along."""
    heads, rows, _ = mask.shape
    crow = torch.zeros(heads, rows + 1, dtype=torch.int32)
    crow[:, 1:] = mask.sum(-1).cumsum(-1)
    longest = int(crow[:, -1].max())
    col = torch.full((heads, longest), -1, dtype=torch.int32)
    leads = None if lead is None else torch.zeros(heads, longest, dtype=torch.int32)
    for head in range(heads):
        places = mask[head].nonzero()
        col[head, : places.shape[0]] = places[:, 1].int()
        if lead is not None and leads is not None:
            leads[head, : places.shape[0]] = lead[head][mask[head]].int()
    return RowLists(crow, col, leads)


def kernel_rows(mask: Tensor, block: int, block_m: int, block_n: int) -> RowLists:
    """Row lists for a causal kernel that takes `block_m` queries and `block_n` keys a step.

    Smaller kernel steps split the blocks of the mask (what lies above the causal diagonal is dropped). Larger query
    steps merge rows: an entry then says how many leading queries of the merged row may use the block, which is exact
    only if visibility inside a merged row never ends before a later row starts it (`prefix_shaped`).

    mask: bool [heads, query blocks, key blocks] of `block` tokens. Raises ValueError for steps that do not fit, and
    for merged rows that a leading count cannot express.
    """
    for name, step in (("block_m", block_m), ("block_n", block_n)):
        if step < 1 or max(step, block) % min(step, block) or (name == "block_n" and step > block):
            raise ValueError(
                f"kernel_rows: {name}={step} must divide block={block}" + (" or be a multiple." * (name == "block_m"))
            )
    fine = min(block, block_m)
    mask = mask.repeat_interleave(block // fine, 1).repeat_interleave(block // block_n, 2)
    last = (torch.arange(mask.shape[1])[:, None] + 1) * fine  # one past the last query of a row
    mask = mask & (torch.arange(mask.shape[2])[None] * block_n < last)
    if block_m <= block:
        return row_lists(mask)
    merge = block_m // block
    pad = -mask.shape[1] % merge
    rows = torch.nn.functional.pad(mask, (0, 0, 0, pad)).unflatten(1, (-1, merge))  # [heads, rows, merge, columns]
    if not prefix_shaped(mask, merge, block, block_n):
        raise ValueError(
            f"kernel_rows: block_m={block_m} merges {merge} rows whose patterns are no prefixes of each other; "
            f"use block_m={block}."
        )
    lead = (rows * (torch.arange(1, merge + 1)[:, None] * block)).amax(2)
    return row_lists(rows.any(2), lead)


def prefix_shaped(mask: Tensor, merge: int, block: int, block_n: int) -> bool:
    """Whether merged causal rows see, of every key block, all their leading queries that may see it, up to the last.

    mask: bool [heads, query rows of `block` tokens, key columns of `block_n` tokens].
    """
    rows = torch.nn.functional.pad(mask, (0, 0, 0, -mask.shape[1] % merge)).unflatten(1, (-1, merge))
    later = rows.flip(2).cummax(2).values.flip(2)  # this or a later row of the merged row uses the column
    first = torch.arange(rows.shape[1] * merge).reshape(-1, merge, 1) * block  # first query of a row
    legal = torch.arange(mask.shape[2]) * block_n < first + block
    return not bool((later & legal & ~rows).any())
