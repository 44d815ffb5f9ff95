"""Partial sums over key blocks: from one pass over the keys, the outputs of every candidate that is made of blocks.

With the dense row maximum m, key block j gives ``l_j = sum exp(s - m)`` and ``o_j = sum exp(s - m) v``; a candidate of
whole blocks is ``sum(o_j) / sum(l_j)`` over its blocks. Blocks it sees in part are computed again with their bit mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.adapt.records import SiteCall
from glocal.plan.blockplan import BlockPlan, unpack


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys and values of some heads in the order of a plan's key blocks, float32 [H, blocks * kv_block, D].

    order: their places, -1 pads. factor: of the logits; softcap: as `Site.softcap`. segment: document of each key, or
    None. first: place of the first key in its sequence.
    """

    keys: Tensor
    values: Tensor
    order: Tensor
    block: int
    factor: float
    softcap: float | None
    segment: Tensor | None
    first: int

    def logits(self, q: Tensor, keys: Tensor) -> Tensor:
        """q [H, R, D], keys [H, K, D] -> [H, R, K]."""
        s = q @ keys.transpose(-1, -2) * self.factor
        return s if self.softcap is None else torch.tanh(s / self.softcap) * self.softcap


@dataclass(frozen=True, eq=False)
class Rows:
    """Query rows of one block: q float32 [H, R, D], their places [R], their documents or None, place of the first query
    in its sequence; causal: whether they see no later key.
    """

    q: Tensor
    places: Tensor
    segment: Tensor | None
    first: int
    causal: bool

    def sees(self, order: Tensor, keys: Keys) -> Tensor:
        """Which keys [K] (places, -1 pads) every row may see in dense attention, bool [R, K]."""
        seen = (order >= 0)[None].expand(len(self.places), -1)
        if self.causal:
            seen = seen & (order[None] + keys.first <= self.places[:, None] + self.first)
        if self.segment is not None and keys.segment is not None:
            mine, theirs = self.segment[:, None], keys.segment[order.clamp(min=0)][None]
            seen = seen & (mine == theirs) & (mine >= 0)
        return seen


@dataclass(frozen=True, eq=False)
class PartialSums:
    """Of some query rows against every key block: mass [H, R, blocks] (dense row maximum taken out) and value
    [H, R, blocks, D]; top [H, R]: that maximum.
    """

    mass: Tensor
    value: Tensor
    top: Tensor


def gather_keys(k: Tensor, v: Tensor, plan: BlockPlan, call: SiteCall, heads: tuple[int, int, int]) -> Keys:
    """Keys of query heads `first` to `last` - 1 of `all` (heads = first, last, all): k, v [B, Hkv, N, D], sample 0."""
    first, last, every = heads
    group = every // k.shape[1]
    order = plan.kv_order[0, first if plan.kv_order.shape[1] > 1 else 0].long()
    own = torch.arange(first, last, device=k.device) // group
    used, back = own.unique(return_inverse=True)
    places = order.clamp(min=0)
    keys, values = k[0, used][:, places].float(), v[0, used][:, places].float()
    if len(used) != len(own):
        keys, values = keys[back], values[back]
    scale = call.site.scale
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    segments = call.layout.segments(k.shape[0], k.device)
    segment = None if segments is None else segments[1][0]
    return Keys(keys, values, order, plan.kv_block, factor, call.site.softcap, segment, call.layout.kv_start)


def rows_of(q: Tensor, plan: BlockPlan, block: int, call: SiteCall, heads: tuple[int, int]) -> Rows:
    """The rows of a query block for query heads `first` to `last` - 1: q [B, H, N, D], sample 0."""
    order = plan.q_order[0, heads[0] if plan.q_order.shape[1] > 1 else 0]
    places = order.reshape(-1, plan.q_block)[block].long()
    places = places[places >= 0]
    segments = call.layout.segments(q.shape[0], q.device)
    segment = None if segments is None else segments[0][0][places]
    if segment is not None:  # padding asks for nothing
        places, segment = places[segment >= 0], segment[segment >= 0]
    return Rows(q[0, slice(*heads)][:, places].float(), places, segment, call.layout.q_start, call.site.causal)


def partial_sums(rows: Rows, keys: Keys) -> PartialSums:
    """One pass over all keys."""
    s = keys.logits(rows.q, keys.keys)
    s.masked_fill_(~rows.sees(keys.order, keys), -torch.inf)  # [H, R, ordered keys]
    top = s.amax(-1)
    p = s.sub_(top.clamp(min=-1e30)[..., None]).exp_().unflatten(-1, (-1, keys.block))  # [H, R, blocks, kv_block]
    value = torch.einsum("hrbk,hbkd->hrbd", p, keys.values.unflatten(1, (-1, keys.block)))
    return PartialSums(p.sum(-1), value, top)


def candidates_at(
    part: PartialSums, plans: Sequence[Lists], block: int, rows: Rows, keys: Keys
) -> tuple[Tensor, Tensor]:
    """Outputs [C, H, R, D] and masses kept [C, H, R] of all plans for the rows of one query block.

    Whole blocks of all plans are one product of [plans, key blocks] with the partial sums; partial blocks are added.
    """
    picked = torch.stack([plan.full(block) for plan in plans], 1)  # [H, C, blocks]
    mass = (picked @ part.mass.transpose(1, 2)).transpose(0, 1).contiguous()  # [C, H, R]
    value = picked @ part.value.transpose(1, 2).flatten(2)  # [H, C, R * D]
    value = value.unflatten(-1, (mass.shape[-1], -1)).transpose(0, 1).contiguous()  # [C, H, R, D]
    for number, plan in enumerate(plans):
        plan.add_partial(mass[number], value[number], (part, block, rows, keys))
    return value / torch.where(mass > 0, mass, 1)[..., None], mass / part.mass.sum(-1).clamp(min=1e-30)


class Lists:
    """The lists of one plan for query heads `first` to `last` - 1, of sample 0; heads that share a list are computed
    together.
    """

    def __init__(self, plan: BlockPlan, heads: tuple[int, int, int]) -> None:
        first, last, every = heads
        owner = plan.owner[0].long()
        self.plan = plan
        self.lists = owner.repeat_interleave(every // owner.numel())[first:last]  # [H]
        distinct = self.lists.unique().tolist()
        if len(distinct) == 1:  # the usual pattern: no copies of keys by head
            self.shared: list[tuple[int, Tensor | slice]] = [(distinct[0], slice(None))]
        else:
            self.shared = [(one, (self.lists == one).nonzero()[:, 0]) for one in distinct]
        order = plan.q_order[0, first if plan.q_order.shape[1] > 1 else 0]
        self.live = order.reshape(-1, plan.q_block) >= 0  # [q blocks, q_block]
        self.places = order.reshape(-1, plan.q_block)
        self.counts = plan.partial.count.cpu()

    def full(self, block: int) -> Tensor:
        """How often each head visits each key block in full, float [H, blocks]."""
        lists = self.plan.full
        index = lists.index[self.lists, block].long()  # [H, most]
        live = torch.arange(index.shape[1], device=index.device) < lists.count[self.lists, block][:, None]
        out = torch.zeros(len(self.lists), self.plan.kv_blocks, device=index.device)
        return out.scatter_add_(1, index, live.float())

    def add_partial(self, mass: Tensor, value: Tensor, at: tuple[PartialSums, int, Rows, Keys]) -> None:
        """Add the partly visible key blocks to mass [H, R] and value [H, R, D]."""
        part, block, rows, keys = at
        lists = self.plan.partial
        assert lists.mask is not None
        kept = self.live[block]
        if int(kept.sum()) != len(rows.places):  # rows that are padding were taken out
            kept = kept & torch.isin(self.places[block].long(), rows.places)
        for one, heads in self.shared:
            count = int(self.counts[one, block])
            if not count:
                continue
            blocks = lists.index[one, block, :count].long()
            order = keys.order.reshape(-1, keys.block)[blocks].flatten()  # [count * kv_block]
            bits = unpack(self.plan.masks[lists.mask[one, block, :count].long()], keys.block)[:, kept]  # [count, R, kv]
            seen = bits.transpose(0, 1).flatten(1) & rows.sees(order, keys)
            own = keys.keys[heads].unflatten(1, (-1, keys.block))[:, blocks].flatten(1, 2)  # [H, count * kv, D]
            s = keys.logits(rows.q[heads], own) - part.top[heads][..., None]
            p = torch.where(seen, s.exp(), 0)
            mass[heads] += p.sum(-1)
            value[heads] += p @ keys.values[heads].unflatten(1, (-1, keys.block))[:, blocks].flatten(1, 2)
