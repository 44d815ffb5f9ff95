"""Skip-softmax: key blocks whose every probability lies below a threshold of the row's largest are left out.

Exact scores decide, so a block that is kept is kept by right; a kernel that fuses the test saves the products with the
values, this router all of the block in attention itself. Threshold t keeps block j for a query block if in any of its
rows max_j - max >= log t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal._exact import exact
from glocal.canvas import Layout, Order
from glocal.patterns.base import Pattern
from glocal.routing.keep import Keep
from glocal.routing.partition import Partition
from glocal.routing.route import RouteSpec, route
from glocal.routing.selection import Selection


@dataclass(frozen=True, eq=False)
class SkipSoftmax:
    """block: token order of query and key blocks. threshold: of the row's largest probability, above 0 and at most 1.
    within: pattern that bounds what may be seen.
    """

    block: int | Order
    threshold: float
    within: Pattern | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"SkipSoftmax: threshold={self.threshold}; legal: above 0 and at most 1.")

    def select(self, q: Tensor, k: Tensor, layout: Layout, scale: float | None = None) -> Selection:
        """Selection for q [B, Hq, N, D] and k [B, Hkv, N, D]."""
        parts = [Partition.blocks(canvas, self.block) for canvas in (layout.q, layout.kv)]
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        scores = best_margin(q, k, parts[0], parts[1], factor)  # [B, Hq, query groups, key groups]
        counts = (scores >= math.log(self.threshold)).sum(-1, dtype=torch.int32).clamp(min=1)
        spec = RouteSpec(parts[0], parts[1], Keep(top=counts), _Known(scores))
        return route(q, k, layout, spec, within=self.within)


@dataclass(frozen=True, eq=False)
class _Known:
    """Scores that were computed before."""

    scores: Tensor

    def __call__(self, q: Tensor, k: Tensor, q_part: Partition, kv_part: Partition) -> Tensor:
        return self.scores


def best_margin(q: Tensor, k: Tensor, q_part: Partition, kv_part: Partition, factor: float) -> Tensor:
    """For every query group and key group the largest of (row's maximum in the key group - row's maximum) over its
    rows, float32 [B, Hq, query groups, key groups]; one query group at a time.
    """
    members = kv_part.members[0, 0].to(q.device)  # [key groups, most]
    keys = kv_part.gather(k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)).flatten(2, 3)
    rows = q_part.members[0, 0].to(q.device).long()  # [query groups, most]
    out = q.new_full((*q.shape[:2], q_part.groups, kv_part.groups), -torch.inf, dtype=torch.float32)
    for number in range(q_part.groups):
        mine = rows[number][rows[number] >= 0]
        with exact(q):
            s = q[:, :, mine].float() @ keys.transpose(-1, -2) * factor  # [B, H, R, key groups * most]
        s = s.masked_fill((members < 0).flatten(), -torch.inf).unflatten(-1, members.shape)
        best = s.amax(-1)  # [B, H, R, key groups]
        out[:, :, number] = (best - best.amax(-1, keepdim=True)).amax(2)
    return out
