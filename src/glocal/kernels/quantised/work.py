"""A plan as quantised attention reads it: sides in plan order, padded to whole blocks, and lists for every head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from glocal._kept import Seen
from glocal.kernels._jobs import _check
from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.quant import Quant
from glocal.kernels.sides import Side

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Work:
    """plan: int32 and contiguous. rows, columns: slots padded to whole blocks."""

    quant: Quant
    plan: PlanTensors
    q: Side
    k: Side
    rows: int
    columns: int

    def ordered_q(self, q: Tensor) -> Tensor:
        """[B, Hq, Nq, D] -> [B, Hq, rows, D]."""
        return _whole(self.for_heads(q.shape[1]).ordered(q), self.rows)

    def ordered_k(self, k: Tensor) -> Tensor:
        """[B, Hkv, Nk, D] -> [B, Hkv, columns, D]."""
        return _whole(self.k.ordered(k), self.columns)

    def returned(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of slots back to tokens."""
        side = self.for_heads(out.shape[1])
        return side.returned(out), side.returned(lse, -torch.inf)

    def for_heads(self, heads: int) -> Side:
        """The query side with an order for every query head, where key heads have orders of their own."""
        if self.q.tokens is None or self.q.heads in (1, heads):
            return self.q
        return replace(self.q, tokens=self.q.tokens.repeat_interleave(heads // self.q.heads, 1))

    @cached_property
    def live(self) -> Tensor | None:
        """Slots that hold a key, bool [b|1, h|1, columns]; None where all do."""
        short = self.columns - self.k.slots
        if self.k.pads is None and short == 0:
            return None
        pads = self.k.pads
        if pads is None:
            pads = torch.zeros(1, 1, self.k.slots, dtype=torch.bool, device=self.plan.owner.device)
        return ~pad(pads, (0, short), value=True)

    @cached_property
    def masked(self) -> bool:
        """Whether some block is partial."""
        return bool((self.plan.part_count > 0).any())

    def key_live(self, heads: int) -> Tensor:
        """The same as a tensor for every query head."""
        if self.live is None:
            return torch.ones(1, 1, self.columns, dtype=torch.bool, device=self.plan.owner.device)
        return _by_head(self.live, heads)

    def lists(self, heads: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Full and partial lists by sample and query head: index, count, rows of the mask table."""
        p, owner = self.plan, _by_head(self.plan.owner.long(), heads)
        for index, count, mask in (
            (p.full_index, p.full_count, None),
            (p.part_index, p.part_count, p.part_mask),
        ):
            yield index[owner], count[owner], None if mask is None else mask[owner]


def work_of(call: Call, nq: int, nk: int) -> Work:
    """The record of a call, made once for each unchanged plan. ValueError where groups or slots do not fit."""
    plan, quant = call.plan, call.quant
    assert plan is not None and quant is not None
    for side, group, block in (("queries", quant.group[0], call.q_block), ("keys", quant.group[1], call.kv_block)):
        if block % group:
            raise ValueError(f"Quant: group={quant.group}: {group} {side} a scale must divide the block of {block}.")
    mark = (quant, call.q_block, call.kv_block, nq, nk)
    tensors = [getattr(plan, field) for field in plan.__dataclass_fields__]
    known = _KNOWN.get(plan.full_index)
    if known is not None and known[0] == mark and known[1].still(tensors):
        return known[2]
    _check(plan, (call.q_block, call.kv_block))
    q, k = Side.of(plan.q_order, nq), Side.of(plan.kv_order, nk)
    if q.times > 1:
        raise ValueError(
            f"backend={call.backend!r}: this plan holds a query in {q.times} slots; legal: each query once."
        )
    made = Work(
        quant=quant,
        plan=PlanTensors(*(getattr(plan, f).int().contiguous() for f in plan.__dataclass_fields__)),
        q=q,
        k=k,
        rows=plan.q_order.shape[-1],
        columns=plan.kv_order.shape[-1],
    )
    _KNOWN[plan.full_index] = (mark, Seen.of(tensors), made)
    return made


def _whole(t: Tensor, slots: int) -> Tensor:
    return pad(t, (0, 0, 0, slots - t.shape[2]))


def _by_head(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[1] in (1, heads) else t.repeat_interleave(heads // t.shape[1], 1)
