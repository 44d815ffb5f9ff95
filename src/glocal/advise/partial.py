"""Partial sums over key blocks: from one pass over the keys, the outputs of every candidate that is made of blocks.

With the dense row maximum m, key block j gives ``l_j = sum exp(s - m)`` and ``o_j = sum exp(s - m) v``; a candidate of
whole blocks is ``sum(o_j) / sum(l_j)`` over its blocks. Blocks it sees in part are summed again under their bit mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.adapt.records import SiteCall
from glocal.advise.router_rows import Blocks
from glocal.plan.blockplan import BlockPlan, unpack


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys and values of some heads in the order of a plan's key blocks, float32 [H, blocks * kv_block, D].

    order: their places, -1 pads; pads: which entries those are (they repeat the first key). factor: of the logits;
    softcap: as `Site.softcap`. segment: document of each key, or None. first: place of the first key in its sequence.
    """

    keys: Tensor
    values: Tensor
    order: Tensor
    block: int
    factor: float
    softcap: float | None
    segment: Tensor | None
    first: int
    pads: Tensor

    def logits(self, q: Tensor) -> Tensor:
        """q [H, R, D] -> [H, K, R]: keys first, so that the keys of a block lie together."""
        s = self.keys @ (q * self.factor).transpose(-1, -2)
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

    def hidden(self, keys: Keys) -> Tensor | None:
        """Which keys each row may not see in dense attention, bool [K, R]; pads as the key that they repeat. None where
        everything is seen.
        """
        hidden: Tensor | None = None
        places = keys.order.clamp(min=0)[:, None]
        if self.causal:
            hidden = places + keys.first > self.places + self.first
        if self.segment is not None and keys.segment is not None:
            theirs = keys.segment[places]
            apart = (theirs != self.segment) | (theirs < 0)
            hidden = apart if hidden is None else hidden | apart
        return hidden


@dataclass(frozen=True, eq=False)
class PartialSums:
    """Of some query rows against every key: p = exp(s - m) [H, blocks, kv_block, R] with the dense row maximum m, 0
    where dense attention hides the key; its sums mass [H, blocks, R] and value [H, blocks, R, D].
    """

    p: Tensor
    mass: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """A query block of one call: places [R] of its rows, which of its places those are, and their documents."""

    number: int
    places: Tensor
    kept: Tensor
    segment: Tensor | None


def blocks_of(plan: Blocks, numbers: Sequence[int], call: SiteCall, segments: Segments, head: int = 0) -> list[Block]:
    """The rows of some query blocks that are there and no padding, of sample 0."""
    order = plan.q_order[0, head if plan.q_order.shape[1] > 1 else 0].reshape(-1, plan.q_block)
    found = []
    for number in numbers:
        places = order[number].long()
        kept = places >= 0
        if segments is not None:
            kept = kept & (segments[0][0][places.clamp(min=0)] >= 0)
        kept = kept.nonzero()[:, 0]
        if len(kept):
            places = places[kept]
            found.append(Block(number, places, kept, None if segments is None else segments[0][0][places]))
    return found


Segments = tuple[Tensor, Tensor] | None


def gather_keys(
    k: Tensor, v: Tensor, plan: Blocks, call: SiteCall, segments: Segments, heads: tuple[int, int, int]
) -> Keys:
    """Keys of query heads `first` to `last` - 1 of `all` (heads = first, last, all): k, v [B, Hkv, N, D], sample 0."""
    first, last, every = heads
    group = every // k.shape[1]
    order = plan.kv_order[0, first if plan.kv_order.shape[1] > 1 else 0].long()
    own = [head // group for head in range(first, last)]
    used = sorted(set(own))
    places = order.clamp(min=0)
    keys, values = (t[0, used[0] : used[-1] + 1][:, places].float() for t in (k, v))
    if len(used) != len(own):
        back = torch.tensor([head - used[0] for head in own], device=k.device)
        keys, values = keys[back], values[back]
    scale = call.site.scale
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    segment = None if segments is None else segments[1][0]
    pads = (order < 0).nonzero()[:, 0]
    return Keys(keys, values, order, plan.kv_block, factor, call.site.softcap, segment, call.layout.kv_start, pads)


def rows_of(q: Tensor, block: Block, call: SiteCall, heads: tuple[int, int]) -> Rows:
    """The rows of a query block for query heads `first` to `last` - 1: q [B, H, N, D], sample 0."""
    mine = q[0, slice(*heads)][:, block.places].float()
    return Rows(mine, block.places, block.segment, call.layout.q_start, call.site.causal)


def partial_sums(rows: Rows, keys: Keys) -> PartialSums:
    """One pass over all keys."""
    s = keys.logits(rows.q)  # [H, ordered keys, R]
    hidden = rows.hidden(keys)
    if hidden is not None:
        s.masked_fill_(hidden, -torch.inf)
    top = s.amax(1, keepdim=True).clamp(min=-1e30)  # pads repeat a key, so they never raise it
    p = s.sub_(top).exp_().index_fill_(1, keys.pads, 0).unflatten(1, (-1, keys.block))  # [H, blocks, kv_block, R]
    value = p.transpose(-1, -2) @ keys.values.unflatten(1, (-1, keys.block))
    return PartialSums(p, p.sum(2), value)


def picks_at(plans: Sequence[Lists], at: int, heads: int) -> Tensor:
    """How often all heads visit each key block in full, by all plans and by dense attention: [H, C + 1, blocks]."""
    every = [plan.full(at, (0, heads)) for plan in plans]
    return torch.stack([*every, torch.ones_like(every[0])], 1)


def candidates_at(
    part: PartialSums,
    plans: Sequence[Lists],
    at: tuple[int, Block],
    keys: Keys,
    heads: tuple[int, int],
    picks: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [C, H, R, D] and masses kept [C, H, R] of all plans for the rows of one query block, and the dense output
    [H, R, D].

    at: its place among the chosen blocks, and itself. picks: as of `picks_at`. Whole blocks of all plans are one
    product of [plans, key blocks] with the partial sums; partial blocks are added.
    """
    picked = picks[slice(*heads)]  # [H, C + 1, blocks]
    mass = (picked @ part.mass).transpose(0, 1).contiguous()  # [C + 1, H, R]
    value = picked @ part.value.flatten(2)  # [H, C + 1, R * D]
    value = value.unflatten(-1, (mass.shape[-1], -1)).transpose(0, 1).contiguous()  # [C + 1, H, R, D]
    for number, plan in enumerate(plans):
        plan.add_partial(mass[number], value[number], (part, keys), at, heads)
    outs = value / torch.where(mass > 0, mass, 1)[..., None]
    return outs[:-1], mass[:-1] / mass[-1].clamp(min=1e-30), outs[-1]


AT_ONCE = 256  # partial blocks copied at a time


class Lists:
    """The lists of one plan at some query blocks, of sample 0; heads that share a list are computed together. plan: the
    plan itself, where all heads share its lists, so that the lists may serve again.

    A block that only padding makes partial counts as full: nothing is summed at padding. What decides the flow lies on
    the CPU, so that a device is waited for once a plan.
    """

    def __init__(self, plan: BlockPlan, numbers: Sequence[int], heads: int) -> None:
        self.numbers = tuple(numbers)
        self.bits: dict[tuple[int, int], Tensor] = {}
        owner = plan.owner[0].cpu().long()
        every = owner.repeat_interleave(heads // owner.numel())  # [H]
        distinct, self.of_head = every.unique(return_inverse=True)  # [U], [H]
        self.several = len(distinct) > 1
        self.plan = None if self.several else plan
        self.masks, self.kv_block = plan.masks, plan.kv_block
        device = plan.device
        pick, chosen = distinct.to(device)[:, None], torch.tensor(list(numbers), device=device)[None]
        index, live = plan.full.index[pick, chosen].long(), plan.full.live[pick, chosen]  # [U, chosen, most]
        self.fulls = torch.zeros(*live.shape[:2], plan.kv_blocks, device=device).scatter_add_(-1, index, live.float())
        assert plan.partial.mask is not None
        index, live = plan.partial.index[pick, chosen].long(), plan.partial.live[pick, chosen]
        masks = plan.partial.mask[pick, chosen].long()
        whole = live & _whole(plan, index, masks, chosen)
        self.fulls.scatter_add_(-1, index, whole.float())
        live = live & ~whole
        order = torch.argsort((~live).byte(), dim=-1, stable=True)
        self.index, self.mask = index.gather(-1, order), masks.gather(-1, order)  # [U, chosen, most]
        self.counts = live.sum(-1).tolist()  # [U][chosen]
        self.of_head_there = self.of_head.to(device)

    def full(self, at: int, heads: tuple[int, int]) -> Tensor:
        """How often each head visits each key block in full, float [H, blocks]."""
        if not self.several:
            return self.fulls[0, at].expand(heads[1] - heads[0], -1)
        return self.fulls[self.of_head_there[slice(*heads)], at]

    def add_partial(
        self,
        mass: Tensor,
        value: Tensor,
        sums: tuple[PartialSums, Keys],
        at: tuple[int, Block],
        heads: tuple[int, int],
    ) -> None:
        """Add the partly visible key blocks to mass [H, R] and value [H, R, D]."""
        if not any(counts[at[0]] for counts in self.counts):
            return
        part, keys = sums
        mine = self.of_head[slice(*heads)]
        for unique in mine.unique().tolist() if self.several else (0,):
            count = self.counts[unique][at[0]]
            if not count:
                continue
            some: slice | Tensor = slice(None)  # the usual pattern: no copies of keys by head
            if self.several:
                some = (mine == unique).nonzero()[:, 0].to(mass.device)
            bits = self._bits(unique, at, count)
            for first in range(0, count, AT_ONCE):
                here = slice(first, min(first + AT_ONCE, count))
                blocks = self.index[unique, at[0], here]
                p = (part.p[some][:, blocks] * bits[here]).flatten(1, 2)  # [H, blocks * kv_block, R]
                mass[some] += p.sum(1)
                values = keys.values[some].unflatten(1, (-1, keys.block))[:, blocks].flatten(1, 2)
                value[some] += p.transpose(1, 2) @ values

    def _bits(self, unique: int, at: tuple[int, Block], count: int) -> Tensor:
        """What the rows of a query block see of its partial key blocks, bool [count, kv_block, R]."""
        seen = self.bits.get((unique, at[0]))
        if seen is None:
            masks = self.masks[self.mask[unique, at[0], :count]]
            seen = unpack(masks, self.kv_block).transpose(1, 2).contiguous()
            if not self.several:  # wanted again by the next heads, and by the next call
                self.bits[unique, at[0]] = seen
        return seen if len(at[1].kept) == seen.shape[-1] else seen[..., at[1].kept]


def _whole(plan: BlockPlan, index: Tensor, masks: Tensor, chosen: Tensor) -> Tensor:
    """Which entries [U, chosen, most] of partial lists show all there is to see."""
    if plan.q_order.shape[1] > 1 or plan.kv_order.shape[1] > 1 or not plan.masks.shape[0]:
        return torch.zeros_like(index, dtype=torch.bool)  # padding differs by head
    rows, keys = (
        (order[0, 0].reshape(-1, block) >= 0).sum(-1)
        for order, block in ((plan.q_order, plan.q_block), (plan.kv_order, plan.kv_block))
    )
    seen = torch.cat([unpack(part, plan.kv_block).sum((-1, -2)) for part in plan.masks.split(1024)])  # [M]
    return seen[masks] == rows[chosen][..., None] * keys[index]


@contextmanager
def quick_products(q: Tensor) -> Iterator[None]:
    """For half-precision tensors on a GPU: products in TF32, which holds every one of their values exactly."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
