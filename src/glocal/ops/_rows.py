"""Logits of chosen query rows against all keys, [B, H, rows, Nk], under any relation, bias and layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal._exact import exact
from glocal.canvas import Canvas, Layout, Part
from glocal.kernels.call import Bias, DenseBias
from glocal.ops.score import Score
from glocal.patterns.base import Dense, Pattern
from glocal.plan.blockplan import BlockPlan, unpack
from glocal.plan.selection import plan_selection
from glocal.routing.selection import Selection

Relation = Pattern | Selection | BlockPlan | None


@dataclass(frozen=True, eq=False)
class Rows:
    """What a row of logits needs. q [B, Hq, Nq, D], k [B, Hkv, Nk, D], float32 or float64; use `Rows.make`."""

    q: Tensor
    k: Tensor
    layout: Layout
    relation: Pattern | BlockPlan | None
    bias: tuple[Bias, ...]
    scale: float | Tensor
    softcap: float | None
    segments: tuple[Tensor, Tensor] | None

    @staticmethod
    def make(q: Tensor, k: Tensor, relation: Relation, canvas: Canvas | Layout | None, score: Score | None) -> Rows:
        """Check shapes; a Selection is compiled."""
        if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[1] % max(k.shape[1], 1) != 0:
            raise ValueError(
                f"Capture: q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)} must be [B, Hq, Nq, D] and "
                "[B, Hkv, Nk, D] with Hq a multiple of Hkv."
            )
        if isinstance(relation, (Selection, BlockPlan)):
            layout = relation.layout
        elif canvas is None:
            if relation is not None:
                raise ValueError(f"Capture: pattern={type(relation).__name__} needs canvas=.")
            layout = Layout(Canvas([Part("tokens", (q.shape[2],))]), Canvas([Part("tokens", (k.shape[2],))]))
        else:
            layout = Layout.of(canvas)
            relation = Dense() if relation is None and layout.policy else relation
        if (layout.nq, layout.nk) != (q.shape[2], k.shape[2]):
            raise ValueError(
                f"Capture: q has {q.shape[2]} and k {k.shape[2]} tokens, but the layout has "
                f"{layout.nq} and {layout.nk}."
            )
        if isinstance(relation, Selection):
            relation = plan_selection(relation, device=q.device)
        elif isinstance(relation, Pattern):
            relation.check(layout)
        have = None if relation is None else relation.heads
        if have not in (None, 1, k.shape[1], q.shape[1]):
            raise ValueError(f"Capture: the relation has {have} heads; legal: 1, {k.shape[1]} or {q.shape[1]}.")
        score = Score() if score is None else score
        scale = q.shape[-1] ** -0.5 if score.scale is None else score.scale
        bias = tuple(term.lower(layout) for term in score.bias)
        high = torch.promote_types(q.dtype, torch.float32)
        segments = layout.segments(q.shape[0], q.device)
        return Rows(q.to(high), k.to(high), layout, relation, bias, scale, score.softcap, segments)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def plain(self) -> bool:
        """Whether every query sees every key for sure, so that no row can be empty."""
        return self.relation is None and self.segments is None and not self.bias

    def logits(self, rows: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits of queries `rows` [n] against all keys (or those of `keys`), -inf where hidden; repeats add log m."""
        q = self.q[:, :, rows]
        k = self.k if keys is None else self.k[:, :, keys]
        times = self.times(rows)  # [b|1, h|1, n, Nk]
        if times is not None and keys is not None:
            times = times[..., keys]
        if times is not None and q.requires_grad | k.requires_grad:  # 0 * NaN of a key nobody sees must not leak
            seen = self._grouped((times > 0).any(2), k.shape[1])
            k = torch.where(seen[..., None], k, 0)
        groups = q.shape[1] // k.shape[1]
        with exact(q):
            s = (q.unflatten(1, (k.shape[1], groups)) @ k.transpose(-1, -2)[:, :, None]).flatten(1, 2)
        s = self.shaped(s)
        for bias in self.bias:
            s = s + _bias_rows(bias, rows, keys).to(s.dtype)
        if times is None:
            return s
        if times.dtype == torch.bool:
            return torch.where(times, s, -torch.inf)
        seen = times > 0
        return torch.where(seen, s + times.clamp(min=1).to(s.dtype).log(), -torch.inf)

    def shaped(self, s: Tensor) -> Tensor:
        """Scale and soft-cap of raw dot products [B, H, n, ...]."""
        scale = self.scale
        s = s * (scale.to(s.dtype).reshape(-1, *(1,) * (s.dim() - 2)) if isinstance(scale, Tensor) else scale)
        return s if self.softcap is None else self.softcap * torch.tanh(s / self.softcap)

    def _grouped(self, seen: Tensor, kv_heads: int) -> Tensor:
        """Bool [b|1, h|1, Nk] as seen by any query head of each key head."""
        return seen if seen.shape[1] in (1, kv_heads) else seen.unflatten(1, (kv_heads, -1)).any(2)

    def times(self, rows: Tensor) -> Tensor | None:
        """How often each query of `rows` sees each key, bool or int [B|1, Hq|1, n, Nk]; None if all see all once."""
        found = None
        if isinstance(self.relation, Pattern):
            found = _pattern_rows(self.relation, self.layout, rows)
        elif self.relation is not None:
            found = _plan_rows(self.relation, rows)
        if found is not None and found.shape[1] not in (1, self.heads):
            found = found.repeat_interleave(self.heads // found.shape[1], 1)
        if self.segments is not None:
            mine, theirs = self.segments[0][:, rows], self.segments[1]
            same = (mine[:, :, None] == theirs[:, None]) & (mine >= 0)[:, :, None]  # [B, n, Nk]
            found = same[:, None] if found is None else found * same[:, None]
        return found


def _pattern_rows(pattern: Pattern, layout: Layout, rows: Tensor) -> Tensor:
    q = layout.q_coords(rows).unsqueeze(1)
    k = layout.kv_coords(torch.arange(layout.nk, device=rows.device)).unsqueeze(0)
    heads = [None] if pattern.heads is None else range(pattern.heads)
    shape = (rows.numel(), layout.nk)
    return torch.stack([pattern.allows(q, k, layout, head).expand(shape) for head in heads])[None]


def _plan_rows(plan: BlockPlan, rows: Tensor) -> Tensor:
    b, h = max(plan.owner.shape[0], plan.q_order.shape[0], plan.kv_order.shape[0]), plan.heads
    nk = plan.layout.nk
    out = torch.zeros(b, h, rows.numel(), nk + 1, dtype=torch.int32, device=rows.device)
    for i in range(b):
        for j in range(h):
            q_order, kv_order, owner = (
                t[i if t.shape[0] > 1 else 0, j if t.shape[1] > 1 else 0]
                for t in (plan.q_order, plan.kv_order, plan.owner)
            )
            owner = int(owner)
            query, slot = (q_order[:, None] == rows[None]).T.nonzero(as_tuple=True)  # places of each row in the order
            block, place = slot // plan.q_block, slot % plan.q_block
            seen = torch.zeros(slot.numel(), plan.kv_blocks, plan.kv_block, dtype=torch.int32, device=rows.device)
            for lists in (plan.full, plan.partial):
                index, count = lists.index[owner, block].long(), lists.count[owner, block]  # [slots, most], [slots]
                live = torch.arange(index.shape[-1], device=rows.device) < count[:, None]
                marks = live[..., None].expand(-1, -1, plan.kv_block).int()
                if lists.mask is not None:
                    if plan.masks.shape[0] == 0:
                        continue
                    words = plan.masks[lists.mask[owner, block].long(), place[:, None]]  # [slots, most, words]
                    marks = marks * unpack(words, plan.kv_block)
                seen.scatter_add_(1, index[..., None].expand_as(marks), marks)
            columns = torch.where(kv_order < 0, nk, kv_order).long()
            ordered = torch.zeros(slot.numel(), nk + 1, dtype=torch.int32, device=rows.device)
            ordered.index_add_(1, columns, seen.flatten(1))
            out[i, j].index_add_(0, query, ordered)
    return out[..., :nk]


def _bias_rows(bias: Bias, rows: Tensor, keys: Tensor | None) -> Tensor:
    if isinstance(bias, DenseBias):
        values = bias.values if bias.values.shape[2] == 1 else bias.values[:, :, rows]
        return values if keys is None or values.shape[3] == 1 else values[..., keys]
    k_code = bias.k_code if keys is None else bias.k_code[keys]
    return looked_up(bias.table, k_code[None] - bias.q_code[rows][:, None])


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries [H|1, ...] of a table [H|1, T]; 0 out of range."""
    inside = (index >= 0) & (index < table.shape[1])
    return torch.where(inside, table[:, torch.where(inside, index, 0)], 0)
