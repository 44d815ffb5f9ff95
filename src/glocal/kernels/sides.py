"""Tokens of one side of a plan in plan order, and results brought back to tokens; plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
