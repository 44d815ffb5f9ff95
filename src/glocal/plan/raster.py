"""Blocks of consecutive raster tokens (no tile order): how many a neighbourhood visits, exactly and without N x N.

A run of raster tokens splits into few boxes, the windows of a box join to one set per axis, and each row of that set
is a few runs of keys again. This is what single-dimensional tiling costs beside multi-dimensional tiles of
Generalized Neighborhood Attention (arXiv 2504.16922).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.patterns.axis import AxisWindow
from glocal.patterns.runs import Box, split_run
from glocal.plan.checks import check_axes


@dataclass(frozen=True)
class RasterVisits:
    """Work of blocks of `q_block` queries and `kv_block` keys in raster order, per head and sample."""

    q_block: int
    kv_block: int
    tokens: int
    visits: tuple[int, ...]  # key blocks with a visible pair, per query block
    visible_pairs: int

    @property
    def visited_blocks(self) -> int:
        return sum(self.visits)

    @property
    def dense_visits(self) -> int:
        """Key blocks per query block without a pattern."""
        return math.ceil(self.tokens / self.kv_block)

    @property
    def worst(self) -> int:
        return max(self.visits)

    @property
    def worst_speedup(self) -> float:
        """Speed-up over dense if all blocks last as long as the busiest."""
        return self.dense_visits / self.worst

    @property
    def mean_speedup(self) -> float:
        """Speed-up over dense if work spreads evenly."""
        return self.dense_visits * len(self.visits) / self.visited_blocks

    @property
    def waste(self) -> float:
        """Pairs computed over visible pairs; 1 is ideal."""
        return self.visited_blocks * self.q_block * self.kv_block / self.visible_pairs


def simulate_raster(
    canvas_shape: Sequence[int], axes: Sequence[AxisWindow], q_block: int, kv_block: int
) -> RasterVisits:
    """Count visited blocks when tokens stay in raster order. Arguments as in `simulate`, blocks in tokens."""
    check_axes(canvas_shape, axes)
    for name, block in (("q_block", q_block), ("kv_block", kv_block)):
        if block < 1:
            raise ValueError(f"{name}={block}; legal: at least 1 token; nearest: 1")
    shape = tuple(canvas_shape)
    tokens = math.prod(shape)
    seen = [_AxisSight(length, rule) for length, rule in zip(shape, axes, strict=True)]
    visits = []
    for first in range(0, tokens, q_block):
        steps = torch.zeros(math.ceil(tokens / kv_block) + 1, dtype=torch.int64)
        for box in split_run(first, min(first + q_block, tokens), shape):
            _mark(box, seen, shape, kv_block, steps)
        visits.append(int((steps.cumsum(0) > 0).sum()))
    return RasterVisits(
        q_block=q_block,
        kv_block=kv_block,
        tokens=tokens,
        visits=tuple(visits),
        visible_pairs=math.prod(axis.pairs for axis in seen),
    )


class _AxisSight:
    """Coordinates of one axis that any query of a range sees."""

    def __init__(self, length: int, rule: AxisWindow) -> None:
        at = torch.arange(length)
        self.length, self.dilation = length, rule.dilation
        self.group = at % rule.dilation
        places = -((self.group - length) // rule.dilation)
        self.start, self.end = rule.span(at // rule.dilation, places)
        self.pairs = int((self.end - self.start).sum())
        self._known: dict[tuple[int, int], Tensor] = {}

    def union(self, first: int, stop: int) -> Tensor:
        """Bool [length]: seen by at least one query in first..stop-1."""
        key = (first, stop)
        if key not in self._known:
            steps = torch.zeros((self.dilation, self.length + 1), dtype=torch.int64)  # [group, place]
            ones = torch.ones(stop - first, dtype=torch.int64)
            steps.index_put_((self.group[first:stop], self.start[first:stop]), ones, accumulate=True)
            steps.index_put_((self.group[first:stop], self.end[first:stop]), -ones, accumulate=True)
            at = torch.arange(self.length)
            self._known[key] = steps.cumsum(1)[self.group, at // self.dilation] > 0
        return self._known[key]


def _mark(box: Box, seen: list[_AxisSight], shape: tuple[int, ...], kv_block: int, steps: Tensor) -> None:
    """Add one to `steps` at the first key block of every run of visible keys, take one off after its last."""
    rows = torch.zeros(1, dtype=torch.int64)
    for axis, (first, stop) in enumerate(box[:-1]):
        coords = seen[axis].union(first, stop).nonzero().flatten()
        rows = (rows[:, None] * shape[axis] + coords).flatten()  # [rows]
    cells = seen[-1].union(*box[-1]).to(torch.int64)
    edges = torch.diff(cells, prepend=cells.new_zeros(1), append=cells.new_zeros(1))
    begin, end = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()  # [runs]
    low = (rows[:, None] * shape[-1] + begin) // kv_block  # [rows, runs]
    high = (rows[:, None] * shape[-1] + end - 1) // kv_block + 1
    ones = torch.ones(low.numel(), dtype=torch.int64)
    steps.index_add_(0, low.flatten(), ones)
    steps.index_add_(0, high.flatten(), -ones)
