"""What people read off attention maps, without the maps: reductions of P computed from (q, k) a few rows at a time.

P = softmax of the logits, or exp(logits - lse) where the LSE of an attention call is given. Time is rows x keys; memory
is `budget` entries, however long the sequence. Users: maps received and rollout (DCAL, arXiv 2205.02151; SG-Former,
arXiv 2308.12216), block statistics (PAROAttention, arXiv 2506.16054), sinks (arXiv 2509.22650), window logits (FNA,
arXiv 2403.04690).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glocal._exact import exact
from glocal.canvas import Canvas, Layout
from glocal.ops._rows import Relation, Rows
from glocal.ops._slots import slot_logits
from glocal.ops.score import Score
from glocal.patterns.neighborhood import Neighborhood
from glocal.routing.partition import Partition

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class BlockStats:
    """Reductions of P over blocks, each [B, H, query groups, key groups]; hidden pairs count as 0, pads do not count.

    sum, square: of P and P^2. max: largest entry. mean: sum over all pairs of the block. share_below: share of the
    block's pairs with P < eps, None if no eps was given. Empty blocks are 0.
    """

    sum: Tensor
    square: Tensor
    max: Tensor
    mean: Tensor
    share_below: Tensor | None


@dataclass(frozen=True, eq=False)
class Capture:
    """Reductions of the attention of q over k.

    q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D]. pattern, canvas, score: as for `glocal.ops.attention`; dropout is ignored.
    lse: [B, Hq, Nq] of the attention call, if its normaliser is wanted; None normalises each row over the
        keys asked for.
    keys: indices [n] of a key subset; columns are these keys, in this order.
    differentiable: results carry gradients to q, k, biases and lse (chunks are recomputed in backward, so memory
        stays bounded); otherwise they are detached.
    budget: entries of P held at once; None is 2 million on a CPU (its cache) and 128 million elsewhere.
    """

    q: Tensor
    k: Tensor
    pattern: Relation = None
    canvas: Canvas | Layout | None = None
    score: Score | None = None
    lse: Tensor | None = None
    keys: Tensor | None = None
    differentiable: bool = False
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.lse is not None and self.lse.shape != self.q.shape[:3]:
            raise ValueError(f"Capture: lse of shape {tuple(self.lse.shape)} must be {tuple(self.q.shape[:3])}.")
        self._rows  # noqa: B018  # shapes are checked here, not at first use

    @cached_property
    def _rows(self) -> Rows:
        return Rows.make(self.q, self.k, self.pattern, self.canvas, self.score)

    @property
    def columns(self) -> int:
        """Keys looked at."""
        return self.k.shape[2] if self.keys is None else self.keys.numel()

    def rows(self, index: Tensor | None = None) -> Tensor:
        """Rows of P for the queries `index` (default all: then this is the whole map), [B, H, n, columns]."""
        index = torch.arange(self.q.shape[2], device=self.q.device) if index is None else index
        parts = [self._apply(self._probabilities, part) for part in self._chunks(index.to(self.q.device))]
        return torch.cat(parts, 2) if parts else self.q.new_zeros(*self.q.shape[:2], 0, self.columns)

    def stream_rows(self, index: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(query indices [n], rows of P [B, H, n, columns]) chunk by chunk, for any other reduction."""
        index = torch.arange(self.q.shape[2], device=self.q.device) if index is None else index
        for part in self._chunks(index.to(self.q.device)):
            yield part, self._apply(self._probabilities, part)

    def weighted(self, weight: Tensor, power: int = 1) -> Tensor:
        """w^T P^power, [B, H, m, columns] for weight [B|1, H|1, m, Nq] (or [m, Nq]): one sum over queries each row.

        One step of attention rollout is ``weighted(relevance)``; a query subset is a weight with zeros.
        """
        if weight.dim() < 2 or weight.shape[-1] != self.q.shape[2]:
            raise ValueError(
                f"weighted: weight of shape {tuple(weight.shape)} must be [B|1, H|1, m, {self.q.shape[2]}]."
            )
        weight = weight.reshape((1,) * (4 - weight.dim()) + tuple(weight.shape))

        def step(part: Tensor, here: Tensor) -> Tensor:
            p = self._probabilities(part)
            with exact(p):
                return here.to(p.dtype) @ (p if power == 1 else p**power)

        return self._total(lambda part: self._apply(step, part, weight[..., part]))

    def column_mean(self, power: int = 1) -> Tensor:
        """Mean of P^power over all queries, [B, H, columns]: the attention a key receives, and its second moment."""
        ones = torch.full((1, self.q.shape[2]), 1 / max(self.q.shape[2], 1), device=self.q.device)
        return self.weighted(ones.to(self._dtype), power).squeeze(2)

    def rollout(self, relevance: Tensor, residual: float = 0.5) -> Tensor:
        """One layer of attention rollout, [B, columns]: residual * r + (1 - residual) * r^T mean over heads of P.

        relevance: [B, Nq], of the layer above. Needs as many keys as queries.
        """
        if self.columns != self.q.shape[2] or relevance.shape != (self.q.shape[0], self.q.shape[2]):
            raise ValueError(
                f"rollout: relevance of shape {tuple(relevance.shape)} must be [{self.q.shape[0]}, {self.q.shape[2]}] "
                f"with as many keys ({self.columns}) as queries."
            )
        passed = self.weighted(relevance[:, None, None]).mean(1).squeeze(1)
        return residual * relevance + (1 - residual) * passed

    def entropy(self) -> Tensor:
        """-sum P log P of each row in nats, [B, H, Nq]; 0 for a row that sees nothing."""

        def step(part: Tensor) -> Tensor:
            p = self._probabilities(part)
            return -torch.where(p > 0, p * torch.where(p > 0, p, 1).log(), 0).sum(-1)

        return self._each_row(step)

    def row_max(self, kind: Literal["probability", "logit"] = "probability") -> Tensor:
        """Largest probability or logit of each row, [B, H, Nq]; 0 or -inf for a row that sees nothing."""
        if kind not in ("probability", "logit"):
            raise ValueError(f"row_max: kind={kind!r}; legal: 'probability', 'logit'.")
        return self._each_row(
            lambda part: (self._probabilities if kind == "probability" else self._logits)(part).amax(-1)
        )

    def blocks(self, q_part: Partition, kv_part: Partition, eps: float | None = None) -> BlockStats:
        """Statistics of P over groups of queries x groups of keys (all keys; `keys` must be None).

        q_part: each query in at most one group. eps: threshold of `BlockStats.share_below`.
        """
        if self.keys is not None:
            raise ValueError("blocks: groups speak about all keys; make a Capture without keys=.")
        label = _labels(q_part.to(self.q.device), self.q.shape[2])  # [b|1, h|1, Nq]
        keys = kv_part.to(self.q.device)
        b, h = self.q.shape[:2]
        shape = (b, h, q_part.groups + 1, kv_part.groups)  # the last row takes queries of no group
        pads = (keys.members < 0).sum(-1)[:, :, None]  # [b|1, h|1, 1, key groups]
        zero = torch.zeros(shape, dtype=self._dtype, device=self.q.device)
        total, square, top, below = zero, zero, zero, zero

        def step(part: Tensor) -> tuple[Tensor, ...]:
            groups = _columns(self._probabilities(part), keys)  # [B, H, n, groups, most], pads are 0
            low = groups.new_zeros(groups.shape[:-1])
            if eps is not None and eps > 0:
                low = ((groups < eps).sum(-1) - pads).to(groups.dtype)
            return groups.sum(-1), groups.square().sum(-1), groups.amax(-1), low

        width = max(1, keys.groups * keys.most)
        for part in self._chunks(torch.arange(self.q.shape[2], device=self.q.device), width):
            found = self._apply(step, part)  # each [B, H, n, key groups]
            place = label[..., part].expand(b, h, -1)[..., None].expand(found[0].shape)
            total, square, below = (
                t.scatter_add(2, place, x) for t, x in ((total, found[0]), (square, found[1]), (below, found[3]))
            )
            top = top.scatter_reduce(2, place, found[2], "amax")
        pairs = q_part.counts.to(label.device)[..., None] * keys.counts[:, :, None]  # [b|1, h|1, groups, groups]
        pairs = pairs.clamp(min=1).to(self._dtype)
        total, square, top, below = (t[:, :, :-1] for t in (total, square, top, below))
        return BlockStats(total, square, top, total / pairs, None if eps is None else below / pairs)

    def window(self, kind: Literal["logits", "probabilities"] = "logits", rows: Tensor | None = None) -> Tensor:
        """The window of a `Neighborhood`, [B, H, n, slots + extra keys], for the grid queries `rows` (default all).

        Slots are row-major from the start of the window, hidden ones -inf (probability 0); keys outside the grid
        follow at the end in the order of the canvas.
        """
        pattern = self.pattern
        if not isinstance(pattern, Neighborhood):
            raise ValueError(f"window: pattern={type(pattern).__name__}; only a Neighborhood has window slots.")
        if kind not in ("logits", "probabilities"):
            raise ValueError(f"window: kind={kind!r}; legal: 'logits', 'probabilities'.")
        source = self._rows
        rows = source.layout.q.indices(source.layout.q.grid.name) if rows is None else rows

        def step(part: Tensor) -> Tensor:
            s = slot_logits(source, pattern, part)
            return s if kind == "logits" else self._normalised(s, part)

        grid = source.layout.q.grid
        slots = prod(axis.window for axis in pattern.axes(grid.axes)) + self.k.shape[2] - grid.tokens
        wide = slots * self.q.shape[-1]  # the gathered keys of a query
        return torch.cat([self._apply(step, part) for part in self._chunks(rows.to(self.q.device), wide)], 2)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    def _chunks(self, index: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
        width = self.columns if width is None else max(width, self.columns)
        budget = (1 << 21 if self.q.device.type == "cpu" else 1 << 27) if self.budget is None else self.budget
        return index.split(max(1, budget // max(1, self.q.shape[0] * self.q.shape[1] * width)))

    def _logits(self, part: Tensor) -> Tensor:
        return self._rows.logits(part, self.keys)

    def _probabilities(self, part: Tensor) -> Tensor:
        return self._normalised(self._logits(part), part)

    def _normalised(self, s: Tensor, part: Tensor) -> Tensor:
        if self.lse is not None:
            z = self.lse[:, :, part].to(s.dtype)[..., None]
            return (s - torch.where(z > -torch.inf, z, 0)).exp()
        if self._rows.plain:
            return s.softmax(-1)
        empty = s.detach().amax(-1, keepdim=True) == -torch.inf  # such a row is 0, and so is its gradient
        return torch.where(empty, 0, torch.where(empty, 0, s).softmax(-1))

    def _apply(self, step: Callable[..., T], *args: Tensor) -> T:
        """Run one chunk: detached, or recomputed in backward."""
        if not self.differentiable:
            with torch.no_grad():
                return step(*args)
        return checkpoint(step, *args, use_reentrant=False)  # type: ignore[return-value]

    def _total(self, step: Callable[[Tensor], Tensor]) -> Tensor:
        chunks = self._chunks(torch.arange(self.q.shape[2], device=self.q.device))
        total = step(chunks[0])
        for part in chunks[1:]:
            total = total + step(part)
        return total

    def _each_row(self, step: Callable[[Tensor], Tensor]) -> Tensor:
        chunks = self._chunks(torch.arange(self.q.shape[2], device=self.q.device))
        return torch.cat([self._apply(step, part) for part in chunks], 2)


def _columns(p: Tensor, part: Partition) -> Tensor:
    """The columns of each group, [B, H, n, groups, most] of p [B, H, n, Nk]; pads are 0."""
    members = part.members.long()
    if part.shared and members.numel() == p.shape[3]:
        plain = members.flatten()
        if torch.equal(plain, torch.arange(plain.numel(), device=plain.device)):
            return p.unflatten(3, members.shape[2:])
    if part.shared:
        found = p[..., members[0, 0].clamp(min=0)]
    else:
        index = members.clamp(min=0).flatten(2)[:, :, None].expand(*p.shape[:3], -1)
        found = p.gather(3, index).unflatten(3, members.shape[2:])
    return torch.where((members >= 0)[:, :, None], found, 0)


def _labels(part: Partition, tokens: int) -> Tensor:
    """Group of each token, int64 [b|1, h|1, tokens]; the number of groups where there is none."""
    slot = part.members.long().flatten(2)
    slot = torch.where(slot < 0, tokens, slot)
    group = torch.arange(part.groups, device=slot.device).repeat_interleave(part.most).expand_as(slot)
    times = torch.zeros(*slot.shape[:2], tokens + 1, dtype=torch.long, device=slot.device)
    if bool((times.scatter_add(2, slot, torch.ones_like(slot))[..., :tokens] > 1).any()):
        raise ValueError(f"blocks: {part!r} has a query in several groups; each may be in one.")
    label = torch.full_like(times, part.groups)
    return label.scatter(2, slot, group)[..., :tokens]
