"""Plans of chosen block counts on the orders of another plan: what a time model is fitted to.

Rows read bands of key blocks that move with them, as windows do, so that caches see what they will see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glocal.plan.blockplan import BlockLists, BlockPlan, pack


@dataclass(frozen=True)
class Counts:
    """density: share of the key blocks that a row of blocks reads. partial: share of those without pads that are seen
    in part.
    skew: how much longer the last row is than the mean, as a share of it; the first one is as much shorter.
    """

    density: float
    partial: float = 0.0
    skew: float = 0.0

    def rows(self, queries: int, keys: int) -> Tensor:
        """Key blocks of each query block, int64 [queries]; at least one, at most all."""
        place = torch.linspace(-1, 1, queries) if queries > 1 else torch.zeros(1)
        return (self.density * keys * (1 + self.skew * place)).round().long().clamp(1, keys)


# Six densities, full blocks alone and 30 % partial ones, even and skewed rows; and six plans that none of those is.
FITTED = tuple(Counts(d, p, s) for d in (0.05, 0.1, 0.2, 0.35, 0.5, 0.75) for p in (0.0, 0.3) for s in (0.0, 0.6))
CHECKED = (
    Counts(0.075),
    Counts(0.15, 0.3, 0.6),
    Counts(0.275, 0.15),
    Counts(0.425, 0.3),
    Counts(0.6, 0.0, 0.3),
    Counts(0.9, 0.15),
)


def counted(base: BlockPlan, wanted: Counts) -> BlockPlan:
    """A plan of these counts for all heads, with orders, blocks and layout of `base`.

    Key blocks with pads are partial, as the pads must not be seen. Raises ValueError for orders that differ by head.
    """
    if base.q_order.shape[:2] != (1, 1) or base.kv_order.shape[:2] != (1, 1):
        raise ValueError(f"counted: {base!r} has orders for heads or samples; legal: one order for all.")
    device, queries, keys = base.device, base.q_blocks, base.kv_blocks
    rows = wanted.rows(queries, keys).to(device)
    row = torch.arange(queries, device=device).repeat_interleave(rows)
    place = torch.arange(row.numel(), device=device) - (rows.cumsum(0) - rows)[row]
    centre = (torch.arange(queries, device=device) * keys) // queries
    column = (centre - rows // 2).clamp(min=0).minimum(keys - rows)[row] + place
    real = (base.kv_order[0, 0] >= 0).reshape(keys, base.kv_block)
    kinds, kind = real.byte().unique(dim=0, return_inverse=True)  # [kinds, kv_block], [keys]
    masks = kinds.bool()[:, None].expand(-1, base.q_block, -1)
    half = torch.ones(base.q_block, base.kv_block, dtype=torch.bool, device=device).tril()
    whole = real.all(1)[column]
    mask = torch.where(whole, len(kinds), kind[column])
    # Of the whole ones those where the number that is due, `partial` of them so far, steps on.
    due = whole.cumsum(0).double()
    seen = ~whole | ((due * wanted.partial).floor() > ((due - 1) * wanted.partial).floor())
    shape, lists = (1, queries), torch.zeros_like(row)
    full = BlockLists.from_entries(shape, lists[~seen], row[~seen], column[~seen])
    partial = BlockLists.from_entries(shape, lists[seen], row[seen], column[seen], mask[seen])
    table = pack(torch.cat([masks, half[None]]))
    return replace(
        base,
        full=full,
        partial=partial,
        masks=table,
        owner=torch.zeros(1, 1, dtype=torch.int32, device=device),
        name=f"{wanted.density:g} of the blocks, {wanted.partial:g} of those in part, skew {wanted.skew:g}",
    )
