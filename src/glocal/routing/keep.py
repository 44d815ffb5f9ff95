"""How many groups a query group keeps: a number, a share, or a mass of the softmax over groups.

Ties go to the lowest index (a stable sort), so results do not depend on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_AT_ONCE = 1 << 24  # scores sorted at a time


@dataclass(frozen=True, eq=False)
class Kept:
    """index: int32 [B, H, query groups, most] key groups, best score first; the first `count` entries count.
    count: int32 [B, H, query groups]. competing: which competing columns won a place, bool [B, H, query groups, X].
    """

    index: Tensor
    count: Tensor
    competing: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Keep:
    """Exactly one of `top`, `ratio`, `mass`.

    top: groups; an int, or an int tensor that broadcasts to [B, H, query groups] (budgets for each head).
    ratio: share of all key groups, rounded down.
    mass: as many of the best groups as hold this share of softmax(scores).
    crossing: whether the group that crosses `mass` is taken: "in" keeps 1 + #(cumulative share <= mass) (Rectified
        SpaAttn, arXiv 2511.19835), "out" keeps #(cumulative share <= mass), possibly none (HeSS, arXiv 2603.25336).
    at_least: lower limit of the number kept by ratio or mass.
    forced: how forced groups count: "inside" (they use up the budget first), "outside" (they neither compete nor use
        it), "union" (all groups compete as if none were forced; forced ones are added afterwards).
    tolerance: added to `mass` in the comparison.
    """

    top: int | Tensor | None = None
    ratio: float | None = None
    mass: float | None = None
    crossing: Literal["in", "out"] = "in"
    at_least: int = 0
    forced: Literal["inside", "outside", "union"] = "outside"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        given = [name for name in ("top", "ratio", "mass") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"Keep: exactly one of top, ratio, mass is needed; given: {', '.join(given) or 'none'}.")
        if isinstance(self.top, int) and self.top < 0:
            raise ValueError(f"Keep: top={self.top} must not be negative.")
        for name in ("ratio", "mass"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"Keep: {name}={value} must lie between 0 and 1.")
        if self.crossing not in ("in", "out"):
            raise ValueError(f"Keep: crossing={self.crossing!r}; legal: 'in', 'out'.")
        if self.forced not in ("inside", "outside", "union"):
            raise ValueError(f"Keep: forced={self.forced!r}; legal: 'inside', 'outside', 'union'.")
        if self.at_least < 0:
            raise ValueError(f"Keep: at_least={self.at_least} must not be negative.")

    def select(
        self,
        scores: Tensor,
        allowed: Tensor | None = None,
        forced: Tensor | None = None,
        competing: Tensor | None = None,
    ) -> Kept:
        """Choose key groups for every row of scores [B, H, query groups, key groups].

        allowed: bool, broadcasts to scores; hidden groups are never kept, forced or not. A score of -inf or NaN hides.
        forced: bool, broadcasts to scores.
        competing: scores [B, H, query groups, X] of further columns (text) that take part in the ranking, the
            softmax and the budget, but are reported apart.
        """
        groups = scores.shape[-1]
        fixed = forced is None and competing is None and self.mass is None and not isinstance(self.top, Tensor)
        if fixed:
            return self._first(scores.detach(), allowed)
        scores, picked = self._picked(scores, allowed, forced, competing)
        mine = picked[..., :groups]
        best = scores[..., :groups].argsort(dim=-1, descending=True, stable=True)
        best = best.gather(-1, (~mine.gather(-1, best)).long().argsort(dim=-1, stable=True))  # the picked ones first
        count = mine.sum(-1, dtype=torch.int32)
        if count.is_cuda:  # looking for the longest list would wait for the device
            most = groups
        else:
            most = int(count.max()) if count.numel() else 0
        live = torch.arange(most, device=count.device) < count[..., None]
        index = torch.where(live, best[..., :most], 0).int()
        return Kept(index, count, None if competing is None else picked[..., groups:])

    def _first(self, scores: Tensor, allowed: Tensor | None) -> Kept:
        """A number that is the same in every row and nothing forced: the first of one sort. A few heads are sorted at a
        time, since places and scores in order take three times the scores.
        """
        visible = scores > -torch.inf
        if allowed is not None:
            visible = visible & allowed.to(scores.device)
        ranking = torch.where(visible, scores, -torch.inf)
        most = min(self._limit(scores.shape[-1]), scores.shape[-1])
        parts = ranking.split(max(1, _AT_ONCE // max(1, ranking[:, 0].numel())), dim=1)
        best = torch.cat([p.argsort(dim=-1, descending=True, stable=True)[..., :most].int() for p in parts], 1)
        count = visible.sum(-1, dtype=torch.int32).clamp(max=most)
        live = torch.arange(most, device=count.device) < count[..., None]
        return Kept(torch.where(live, best, 0), count)

    def mask(
        self,
        scores: Tensor,
        allowed: Tensor | None = None,
        forced: Tensor | None = None,
        competing: Tensor | None = None,
    ) -> Tensor:
        """What `select` keeps as a map, bool like scores; it need not put the kept groups in order."""
        return self._picked(scores, allowed, forced, competing)[1][..., : scores.shape[-1]]

    def _picked(
        self, scores: Tensor, allowed: Tensor | None, forced: Tensor | None, competing: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores, competing ones behind them and hidden ones at -inf, and which of them are kept."""
        groups = scores.shape[-1]
        scores = scores.detach()
        visible = scores > -torch.inf  # false for NaN too
        if allowed is not None:
            visible = visible & allowed.to(scores.device)
        must = torch.zeros_like(visible) if forced is None else forced.to(scores.device).expand(scores.shape) & visible
        if competing is not None:
            scores = torch.cat([scores, competing.detach().to(scores)], -1)
            visible = torch.cat([visible, competing > -torch.inf], -1)
            must = torch.cat([must, torch.zeros_like(competing, dtype=torch.bool)], -1)
        scores = torch.where(visible, scores, -torch.inf)
        return scores, self._ranked(scores, visible, must, groups) | must

    def _limit(self, groups: int) -> int:
        """The fixed number of groups that `top` or `ratio` keeps."""
        if isinstance(self.top, int):
            return max(self.top, self.at_least)
        assert self.ratio is not None
        return max(int(self.ratio * groups), self.at_least)

    def _ranked(self, scores: Tensor, visible: Tensor, must: Tensor, groups: int) -> Tensor:
        """Which columns the budget buys, bool like scores."""
        candidates = visible & ~must if self.forced == "outside" else visible
        ranking = torch.where(candidates, scores, -torch.inf)
        if self.forced == "inside":
            ranking = torch.where(must, torch.inf, ranking)
        if self.mass is not None and self.forced != "inside" and ranking.dtype != torch.float64:
            return by_mass(ranking, self.mass + self.tolerance, int(self.crossing == "in"), self.at_least)
        best = ranking.argsort(dim=-1, descending=True, stable=True)
        if self.mass is not None:  # forced groups lead whatever their share
            share = torch.where(candidates, scores, -torch.inf).softmax(-1).nan_to_num()  # a row of -inf has no mass
            total = share.gather(-1, best).cumsum(-1)
            budget = (total <= self.mass + self.tolerance).sum(-1, keepdim=True)
            if self.crossing == "in":
                budget = budget + 1
            budget = budget.clamp(min=self.at_least)
        elif isinstance(self.top, Tensor):
            budget = self.top.to(scores.device)
            budget = budget.expand(scores.shape[:-1])[..., None].clamp(min=self.at_least)
        else:
            budget = self._limit(groups)
        place = torch.arange(scores.shape[-1], device=scores.device)
        won = place.expand_as(best) < budget
        return torch.zeros_like(visible).scatter_(-1, best, won) & candidates


@torch.library.custom_op("glocal::by_mass", mutates_args=())
def by_mass(scores: Tensor, mass: float, first: int, least: int) -> Tensor:
    """Which columns of scores [..., columns] are kept, bool: the best whose shares of softmax(scores) together are at
    most `mass`, `first` more, and `least` at least; none of -inf. Ties go to the lowest column.

    On CUDA `glocal.ops` puts a Triton kernel in its place.
    """
    return plain_by_mass(scores, mass, first, least)


def plain_by_mass(scores: Tensor, mass: float, first: int, least: int) -> Tensor:
    """`by_mass` in plain torch."""
    best = scores.argsort(dim=-1, descending=True, stable=True)
    share = scores.softmax(-1).nan_to_num()  # a row of -inf has no mass
    budget = (share.gather(-1, best).cumsum(-1) <= mass).sum(-1, keepdim=True) + first
    won = torch.arange(scores.shape[-1], device=scores.device).expand_as(best) < budget.clamp(min=least)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, won) & (scores > -torch.inf)


@by_mass.register_fake
def _(scores: Tensor, mass: float, first: int, least: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
