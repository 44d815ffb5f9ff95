"""What a guest reads of a block plan: token gathers, full-block lists for every head, and the plan of what is left.

Guests visit whole key blocks in the order of a list and mask nothing but the end of the sequence. Full blocks whose
keys hold pads elsewhere, and all partial blocks, are left to our own kernels (`rest`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from glocal._kept import Seen
from glocal.kernels._jobs import _check
from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.sides import Side
from glocal.plan.blockplan import BlockLists

# By the tensor of the full lists: making a record looks at the lists, which waits for the device.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan for a guest.

    count: int32 [b|1, h|1, query blocks]; index: int32 [b|1, h|1, query blocks, most], most >= 1, in rising order.
    rest: what our kernels still have to do, None if nothing. repeats: a list names a block twice.
    """

    q: Side
    k: Side
    count: Tensor
    index: Tensor
    rest: PlanTensors | None
    repeats: bool
    blocks: tuple[int, int]

    @cached_property
    def empty(self) -> Tensor | None:
        """Query blocks without a listed key block, bool [b|1, h|1, query blocks]; None where there are none."""
        found = self.count == 0
        return found if bool(found.any()) else None

    @cached_property
    def equal(self) -> int | None:
        """The length of all lists, None where they differ or are empty."""
        least, most = int(self.count.min()), int(self.count.max())
        return most if least == most > 0 else None

    @cached_property
    def some(self) -> bool:
        """Whether the guest has anything to do."""
        return bool((self.count > 0).any())

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """Query blocks of each key block, as count and index."""
        lists = BlockLists(self.count.flatten(0, 1), self.index.flatten(0, 1))
        u, row, column, _ = lists.entries()
        kv_blocks = -(-self.k.slots // self.blocks[1])
        turned = BlockLists.from_entries((lists.count.shape[0], kv_blocks), u, column, row)
        index = turned.index if turned.index.shape[-1] else turned.index.new_zeros(*turned.index.shape[:2], 1)
        lead = self.count.shape[:2]
        return turned.count.unflatten(0, lead), index.unflatten(0, lead).contiguous()


def prepare(call: Call, nq: int, nk: int, name: str) -> Prepared:
    """The record for a call, made once for each unchanged plan. ValueError where a query lies in two slots."""
    plan = call.plan
    assert plan is not None
    blocks = (call.q_block, call.kv_block)
    mark, tensors = (blocks, nq, nk), [getattr(plan, field) for field in plan.__dataclass_fields__]
    known = _KNOWN.get(plan.full_index)
    if known is not None and known[0] == mark and known[1].still(tensors):
        return known[2]
    _check(plan, blocks)
    made = _prepare(plan, blocks, nq, nk)
    if made.q.times > 1:
        raise ValueError(
            f"backend={name!r}: this plan holds a query in {made.q.times} slots; legal: each query once, "
            "or another backend."
        )
    _KNOWN[plan.full_index] = (mark, Seen.of(tensors), made)
    return made


def _prepare(plan: PlanTensors, blocks: tuple[int, int], nq: int, nk: int) -> Prepared:
    q, k = Side.of(plan.q_order, nq), Side.of(plan.kv_order, nk)
    rows, columns = -(-q.slots // blocks[0]), -(-k.slots // blocks[1])
    owner = plan.owner.long()
    index = plan.full_index[owner][:, :, :rows].int()  # [b, h, query blocks, most]
    live = torch.arange(index.shape[-1], device=index.device) < plan.full_count[owner][:, :, :rows, None]
    place = index.long().clamp(0, max(0, columns - 1))
    here = _sorted(index, live, columns)
    again = bool(((here[..., 1:] == here[..., :-1]) & (here[..., 1:] < columns)).any())
    # The end of the sequence is masked in the last entry of a list alone, so a last block listed twice must go.
    holes = _holes(k, blocks[1], columns, index.device if again else None)
    left = plan.part_count.any() if holes is None else None
    dropped = None
    if holes is not None:
        lead = torch.broadcast_shapes(live.shape[:2], holes.shape[:2])
        live, place, index = (t.expand(*lead, *t.shape[2:]) for t in (live, place, index))
        bad = holes.expand(*lead, -1)[:, :, None].expand(*lead, rows, -1).gather(3, place) & live
        dropped = bad if bool(bad.any()) else None
        live = live & ~bad
        left = plan.part_count.any() | bad.any()
    count, kept = _compact(index, live, columns)
    rest = _rest(plan, index, dropped) if left is not None and bool(left) else None
    return Prepared(q, k, count, kept, rest, again, blocks)


def _holes(k: Side, block: int, columns: int, cut: torch.device | None) -> Tensor | None:
    """Key blocks that hold pads, bool [b|1, h|1, columns]. cut: a last block cut short counts too, made there."""
    short = columns * block - k.slots
    pads = k.pads
    if pads is None:
        if cut is None or short == 0:
            return None
        pads = torch.zeros(1, 1, k.slots, dtype=torch.bool, device=cut)
    return pad(pads, (0, short), value=cut is not None).unflatten(2, (columns, block)).any(-1)


def _sorted(index: Tensor, live: Tensor, columns: int) -> Tensor:
    return torch.where(live, index, columns).sort(-1).values


def _compact(index: Tensor, live: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Live entries in rising order, as count and index at least one wide; entries past the count are 0."""
    count = live.sum(-1, dtype=torch.int32)
    most = max(1, int(count.max()) if count.numel() else 0)
    kept = _sorted(index, live, columns)[..., :most]
    kept = pad(kept, (0, most - kept.shape[-1]), value=columns)
    return count.contiguous(), torch.where(kept < columns, kept, 0).int().contiguous()


def _rest(plan: PlanTensors, index: Tensor, dropped: Tensor | None) -> PlanTensors:
    """The plan of the partial blocks and of the full ones that the guest cannot take."""
    none = plan.full_index[..., :0].contiguous()
    if dropped is None:
        return replace(plan, full_count=torch.zeros_like(plan.full_count), full_index=none)
    b, h, rows = dropped.shape[:3]
    count, kept = _compact(index, dropped, 1 << 30)
    owner = plan.owner.long().expand(b, h)
    missing = plan.part_count.shape[1] - rows  # query blocks of pads alone
    return replace(
        plan,
        full_count=pad(count, (0, missing)).flatten(0, 1),
        full_index=pad(kept, (0, 0, 0, missing)).flatten(0, 1),
        part_count=plan.part_count[owner].flatten(0, 1),
        part_index=plan.part_index[owner].flatten(0, 1),
        part_mask=plan.part_mask[owner].flatten(0, 1),
        owner=torch.arange(b * h, dtype=torch.int32, device=index.device).view(b, h),
    )
