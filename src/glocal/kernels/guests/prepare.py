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

from glocal.kernels._jobs import _check
from glocal.kernels.call import Call, PlanTensors
from glocal.plan.blockplan import BlockLists

# By the tensor of the full lists: making a record looks at the lists, which waits for the device.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Side:
    """Tokens of one side in plan order, its pads at the end cut off.

    tokens: int64 [b|1, h|1, slots], -1 pads; None where slot i is token i. count: tokens of the call.
    """

    tokens: Tensor | None
    slots: int
    count: int

    @staticmethod
    def of(order: Tensor, count: int) -> Side:
        """From an order of a plan; waits for the device."""
        live = (order >= 0).flatten(0, 1).any(0).nonzero()
        slots = int(live[-1]) + 1 if live.numel() else 0
        tokens = order[..., :slots].long()
        if slots == count and bool((tokens == torch.arange(count, device=order.device)).all()):
            return Side(None, slots, count)
        return Side(tokens, slots, count)

    @cached_property
    def pads(self) -> Tensor | None:
        """Bool [b|1, h|1, slots], None where there are none."""
        if self.tokens is None or not bool((self.tokens < 0).any()):
            return None
        return self.tokens < 0

    @cached_property
    def times(self) -> int:
        """How often the most frequent token occurs in one order."""
        if self.tokens is None:
            return 1
        return int(self._counted().max()) if self.count else 0

    @cached_property
    def back(self) -> Tensor | None:
        """Slot of each token, int64 [b|1, h|1, count], `slots` for a token outside the order; None where it is i."""
        if self.tokens is None:
            return None
        place = torch.arange(self.slots, device=self.tokens.device).expand_as(self.tokens)
        to = torch.where(self.tokens < 0, self.count, self.tokens)
        out = torch.full((*to.shape[:2], self.count + 1), self.slots, device=to.device)
        return out.scatter_(2, to, place)[..., : self.count]

    @cached_property
    def misses(self) -> bool:
        """Whether a token lies outside the order."""
        return self.back is not None and bool((self.back == self.slots).any())

    @property
    def heads(self) -> int:
        """Heads with an order of their own."""
        return 1 if self.tokens is None else self.tokens.shape[1]

    def ordered(self, t: Tensor, fill: float = 0.0) -> Tensor:
        """[B, H, count, ...] -> [B, H, slots, ...]; pads hold `fill`."""
        if self.tokens is None:
            return t
        out = _taken(t, self.tokens.clamp(min=0))
        if self.pads is None:
            return out
        return out.masked_fill(_over(self.pads, t), fill)

    def returned(self, t: Tensor, fill: float = 0.0) -> Tensor:
        """[B, H, slots, ...] -> [B, H, count, ...] for tokens that lie in one slot; others hold `fill`."""
        if self.back is None:
            return t[:, :, : self.count]
        out = _taken(t, self.back.clamp(max=max(0, self.slots - 1)))
        return out.masked_fill(_over(self.back == self.slots, t), fill) if self.misses else out

    def summed(self, t: Tensor) -> Tensor:
        """As `returned`, for tokens that lie in several slots: the sum over them."""
        if self.times <= 1:
            return self.returned(t)
        assert self.tokens is not None
        to = torch.where(self.tokens < 0, self.count, self.tokens).expand(*t.shape[:2], -1)
        out = t.new_zeros(*t.shape[:2], self.count + 1, t.shape[3], dtype=torch.float32)
        out.scatter_add_(2, to[..., None].expand(t.shape), t.float())
        return out[:, :, : self.count].to(t.dtype)

    def _counted(self) -> Tensor:
        assert self.tokens is not None
        to = torch.where(self.tokens < 0, self.count, self.tokens)
        out = torch.zeros(*to.shape[:2], self.count + 1, dtype=torch.long, device=to.device)
        return out.scatter_add_(2, to, torch.ones_like(to))[..., : self.count]


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
    mark = (blocks, nq, nk, *(_version(getattr(plan, field)) for field in plan.__dataclass_fields__))
    known = _KNOWN.get(plan.full_index)
    if known is not None and known[0] == mark:
        return known[1]
    _check(plan, blocks)
    made = _prepare(plan, blocks, nq, nk)
    if made.q.times > 1:
        raise ValueError(
            f"backend={name!r}: this plan holds a query in {made.q.times} slots; legal: each query once, "
            "or another backend."
        )
    _KNOWN[plan.full_index] = (mark, made)
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


def _taken(t: Tensor, place: Tensor) -> Tensor:
    """[B, H, n, ...] at place [b|1, h|1, m] -> [B, H, m, ...]."""
    if place.shape[0] == place.shape[1] == 1:
        return t.index_select(2, place[0, 0])
    place = place.expand(*t.shape[:2], -1)
    if t.dim() == 3:
        return t.gather(2, place)
    return t.gather(2, place[..., None].expand(-1, -1, -1, t.shape[3]))


def _over(mask: Tensor, t: Tensor) -> Tensor:
    return mask if t.dim() == 3 else mask[..., None]


def _version(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version
