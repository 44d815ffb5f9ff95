"""Route by content: score groups, keep the best, return a Selection.

One function serves BiFormer (regions, one score for all heads), pooled top-k, cumulative-mass routers and routers
with budgets for each head; what differs is the partition, the scorer and the `Keep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glocal._exact import exact
from glocal.canvas import Canvas, Layout, Order
from glocal.patterns.base import Dense, Pattern
from glocal.routing.keep import Keep
from glocal.routing.partition import Partition
from glocal.routing.scorers import BlockMean, Scorer
from glocal.routing.selection import Selection
from glocal.routing.visible import visible_groups


@dataclass(frozen=True, eq=False)
class RouteSpec:
    """How to route: the groups of both sides, how many to keep, how to score.

    dedupe: keys that lie in several kept groups count once.
    differentiable: scores carry gradients to q and k (`Selection.scores`); the choice itself never does.
    """

    q_part: Partition
    kv_part: Partition
    keep: Keep
    scorer: Scorer = field(default_factory=BlockMean)
    dedupe: bool = False
    differentiable: bool = False


def route(
    q: Tensor,
    k: Tensor,
    layout: Canvas | Layout,
    spec: RouteSpec,
    *,
    within: Pattern | None = None,
    forced: Tensor | None = None,
    competing: Tensor | None = None,
) -> Selection:
    """The key groups that each query group attends to.

    q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D]; scored in float32. layout: where the tokens lie.
    within: candidates are only groups with a pair the pattern shows; inside kept groups it still hides pairs. The
        layout's policy table holds even without a pattern.
    forced: bool that broadcasts to [B, Hq|1, query groups, key groups]; groups always kept (if the pattern shows them).
    competing: scores of columns outside the key groups that compete for places, as in `Keep.select`.
    Ties go to the lowest group. Raises ValueError where tokens, groups or heads do not fit.
    """
    layout = Layout.of(layout)
    if not isinstance(spec, RouteSpec):
        raise TypeError(f"route: spec is a {type(spec).__name__}; legal: RouteSpec(q_part, kv_part, Keep(...)).")
    for name, x, tokens in (("q", q, layout.nq), ("k", k, layout.nk)):
        if x.dim() != 4 or x.shape[2] != tokens:
            raise ValueError(
                f"route: {name} of shape {tuple(x.shape)} must be [batch, heads, {tokens}, head size] for {layout.q!r}."
            )
    q_part, kv_part = spec.q_part.to(q.device), spec.kv_part.to(q.device)
    scored = q_part, kv_part
    segments = layout.segments(q.shape[0], q.device)
    if segments is not None:  # padding is no part of a mean
        scored = q_part.without(segments[0] < 0), kv_part.without(segments[1] < 0)
    learns = spec.differentiable and torch.is_grad_enabled()
    with torch.set_grad_enabled(learns), exact(q):  # rounded scores would tie
        scores = spec.scorer(q, k, *scored)  # [B, Hq|1, query groups, key groups]
    within = Dense() if within is None and layout.policy else within
    allowed = None
    if within is not None:
        allowed = _heads(visible_groups(within, layout, q_part, kv_part), scores.shape[1])
    kept = spec.keep.select(scores, allowed, forced, competing)
    return Selection(
        layout,
        q_part,
        kv_part,
        kept.index,
        kept.count,
        within=within,
        dedupe=spec.dedupe,
        scores=scores.gather(-1, kept.index.long()),
        competing=kept.competing,
    )


def _heads(allowed: Tensor, heads: int) -> Tensor:
    """A mask with 1 or `heads` heads; a pattern of key heads serves its query heads."""
    have = allowed.shape[1]
    if have in (1, heads):
        return allowed
    if heads == 1:  # one list for all heads: a group counts if any head may look at it
        return allowed.any(1, keepdim=True)
    if heads % have != 0:
        raise ValueError(f"route: within has {have} heads, which do not divide the {heads} heads of the scores.")
    return allowed.repeat_interleave(heads // have, 1)


@dataclass(frozen=True, eq=False)
class PooledTopK:
    """Block top-k by pooled queries and keys: the plainest content router.

    block: tokens of a query block, a box such as (4, 8, 8), or an Order. kv_block: the same for keys; None is `block`.
    keep: how many key blocks. scorer: how they are scored. within: pattern that bounds the candidates.
    own: every query block also sees the key block of the same number, counted as `keep.forced` says.
    """

    block: int | Sequence[int] | Order
    keep: Keep
    kv_block: int | Sequence[int] | Order | None = None
    scorer: Scorer = field(default_factory=BlockMean)
    within: Pattern | None = None
    own: bool = False

    def parts(self, layout: Layout) -> tuple[Partition, Partition]:
        """The blocks of queries and of keys."""
        kv_block = self.block if self.kv_block is None else self.kv_block
        q_part, kv_part = (
            Partition.blocks(_present(canvas, tokens), block)
            for canvas, tokens, block in ((layout.q, layout.nq, self.block), (layout.kv, layout.nk, kv_block))
        )
        return q_part, kv_part

    def select(self, q: Tensor, k: Tensor, layout: Canvas | Layout, *, rows: Tensor | None = None) -> Selection:
        """Selection for q [B, Hq, Nq, D] and k [B, Hkv, Nk, D]. rows: numbers of the query blocks that are asked for;
        None for all.
        """
        layout = Layout.of(layout)
        q_part, kv_part = self.parts(layout)
        forced = None
        if self.own:
            if q_part.groups != kv_part.groups:
                raise ValueError(
                    f"PooledTopK: own=True needs as many query blocks ({q_part.groups}) as key blocks "
                    f"({kv_part.groups})."
                )
            forced = torch.eye(q_part.groups, dtype=torch.bool, device=q.device)
        if rows is not None:
            forced = None if forced is None else forced[rows]
            q_part = q_part.some(rows)
        return route(
            q, k, layout, RouteSpec(q_part, kv_part, self.keep, self.scorer), within=self.within, forced=forced
        )


def _present(canvas: Canvas, tokens: int) -> Canvas | int:
    """What is cut into blocks: the canvas, or the run of tokens that is present of it."""
    return canvas if tokens == canvas.size else tokens


def pooled_topk(
    q: Tensor,
    k: Tensor,
    layout: Canvas | Layout,
    block: int | Sequence[int],
    top: int,
    *,
    within: Pattern | None = None,
) -> Selection:
    """`PooledTopK` with a number of key blocks: what most people mean by block top-k."""
    return PooledTopK(block, Keep(top=top), within=within).select(q, k, layout)
