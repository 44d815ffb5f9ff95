"""Count the key tiles each query tile visits, without a GPU: the tile simulator of GNA (NATTENSim, arXiv 2504.16922).

A neighbourhood is a product of per-axis windows, so every count is a product of per-axis counts. Nothing grows with the
square of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from glocal._errors import check_choice
from glocal.patterns.axis import AxisWindow
from glocal.plan.axis_visits import AxisVisits, Tiling, visit_axis
from glocal.plan.checks import check_axes, check_tile

Schedule = Literal["worst", "mean"]
_TILINGS: tuple[Tiling, ...] = ("static", "dynamic")
_SCHEDULES: tuple[Schedule, ...] = ("worst", "mean")


@dataclass(frozen=True)
class Backward:
    """The inverse relation: query tiles per key tile, which the gradient of keys and values loops over."""

    kv_tiles: int
    worst: int
    mean: float
    op_speedup: float


@dataclass(frozen=True)
class Simulation:
    """Work of one pattern on one tile grid, per head and sample. Blocks are (query tile, key tile) pairs."""

    axes: tuple[AxisVisits, ...]
    tiling: Tiling
    schedule: Schedule

    @property
    def canvas(self) -> tuple[int, ...]:
        return tuple(a.length for a in self.axes)

    @property
    def tokens(self) -> int:
        return math.prod(self.canvas)

    @property
    def q_tile(self) -> tuple[int, ...]:
        return tuple(a.q_tile for a in self.axes)

    @property
    def kv_tile(self) -> tuple[int, ...]:
        return tuple(a.kv_tile for a in self.axes)

    @property
    def q_tiles(self) -> int:
        """Query tiles, all dilation groups together."""
        return math.prod(len(a.visits) for a in self.axes)

    @property
    def dense_visits(self) -> int:
        """Key tiles per query tile without a pattern."""
        return math.prod(a.dense_kv_tiles for a in self.axes)

    @property
    def dense_blocks(self) -> int:
        """Blocks of dense attention on the same tile sizes."""
        return self.dense_visits * math.prod(a.dense_q_tiles for a in self.axes)

    @cached_property
    def visited_blocks(self) -> int:
        """Blocks with at least one visible pair (under dynamic tiling: tiles loaded from the window's start on)."""
        return math.prod(sum(a.visits) for a in self.axes)

    @cached_property
    def full_blocks(self) -> int:
        """Visited blocks that need no mask: all pairs are visible and the key tile holds no padding."""
        return math.prod(sum(a.full) for a in self.axes)

    @property
    def partial_blocks(self) -> int:
        """Visited blocks that need a mask."""
        return self.visited_blocks - self.full_blocks

    @cached_property
    def worst(self) -> int:
        """Key tiles of the busiest query tile: the largest product is the product of the largest."""
        return math.prod(max(a.visits) for a in self.axes)

    @property
    def mean(self) -> float:
        """Key tiles of an average query tile."""
        return self.visited_blocks / self.q_tiles

    @property
    def worst_speedup(self) -> float:
        """Speed-up over dense if all tiles last as long as the busiest (one tile a processor, the paper's model)."""
        return self.dense_blocks / (self.worst * self.q_tiles)

    @property
    def mean_speedup(self) -> float:
        """Speed-up over dense if work spreads evenly (many more tiles than processors, persistent kernel)."""
        return self.dense_blocks / self.visited_blocks

    @property
    def op_speedup(self) -> float:
        """Speed-up of the operator over dense under the chosen schedule."""
        return self.worst_speedup if self.schedule == "worst" else self.mean_speedup

    @cached_property
    def visible_pairs(self) -> int:
        """(query, key) pairs the pattern allows."""
        return math.prod(a.visible for a in self.axes)

    @property
    def kept(self) -> float:
        """Visible pairs over all pairs."""
        return self.visible_pairs / self.tokens**2

    @property
    def flop_bound(self) -> float:
        """Speed-up if only visible pairs cost time: all pairs over visible pairs."""
        return self.tokens**2 / self.visible_pairs

    @property
    def waste(self) -> float:
        """Pairs computed (padding of ragged tiles included) over visible pairs; 1 is ideal."""
        return self.visited_blocks * math.prod(self.q_tile) * math.prod(self.kv_tile) / self.visible_pairs

    @property
    def effective_speedup(self) -> float:
        """Speed-up over a dense kernel that pads nothing: counts the pairs of ragged tiles against the pattern only.

        Equal to `op_speedup` where the tiles divide the canvas, smaller elsewhere, never above `flop_bound`.
        """
        blocks = self.worst * self.q_tiles if self.schedule == "worst" else self.visited_blocks
        return self.tokens**2 / (blocks * math.prod(self.q_tile) * math.prod(self.kv_tile))

    @property
    def perfectly_block_sparse(self) -> bool:
        """Whether visited blocks hold visible pairs alone, padding aside; `op_speedup` then is `flop_bound`."""
        return all(a.perfect for a in self.axes)

    @cached_property
    def backward(self) -> Backward:
        """Counts of the inverse relation; windows shift at borders, so it is not the transpose of the forward."""
        tiles = math.prod(len(a.inverse) for a in self.axes)
        worst = math.prod(max(a.inverse) for a in self.axes)
        total = math.prod(sum(a.inverse) for a in self.axes)
        speedup = self.dense_blocks / (worst * tiles if self.schedule == "worst" else total)
        return Backward(kv_tiles=tiles, worst=worst, mean=total / tiles, op_speedup=speedup)

    def end_to_end(self, share: float, speedup: float | None = None) -> float:
        """Speed-up of the whole when self-attention takes `share` (0..1) of its time; `speedup`: op_speedup."""
        return end_to_end(share, self.op_speedup if speedup is None else speedup)

    def as_dict(self, share: float | None = None) -> dict[str, Any]:
        """Plain record for JSON and tables."""
        record: dict[str, Any] = {
            "canvas": list(self.canvas),
            "window": [a.window.window for a in self.axes],
            "stride": [a.window.stride for a in self.axes],
            "dilation": [a.window.dilation for a in self.axes],
            "causal": [a.window.causal for a in self.axes],
            "q_tile": list(self.q_tile),
            "kv_tile": list(self.kv_tile),
            "tiling": self.tiling,
            "schedule": self.schedule,
            "q_tiles": self.q_tiles,
            "dense_visits": self.dense_visits,
            "worst_visits": self.worst,
            "mean_visits": self.mean,
            "visited_blocks": self.visited_blocks,
            "full_blocks": self.full_blocks,
            "partial_blocks": self.partial_blocks,
            "kept": self.kept,
            "waste": self.waste,
            "op_speedup": self.op_speedup,
            "effective_speedup": self.effective_speedup,
            "worst_speedup": self.worst_speedup,
            "mean_speedup": self.mean_speedup,
            "flop_bound": self.flop_bound,
            "backward_speedup": self.backward.op_speedup,
            "perfectly_block_sparse": self.perfectly_block_sparse,
        }
        if share is not None:
            record["share"] = share
            record["end_to_end"] = self.end_to_end(share)
            record["end_to_end_bound"] = self.end_to_end(share, self.flop_bound)
        return record


def end_to_end(share: float, speedup: float) -> float:
    """Amdahl's law: speed-up of the whole when the part that takes `share` of the time runs `speedup` times faster."""
    if not 0 <= share <= 1:
        nearest = min(max(share, 0.0), 1.0)
        raise ValueError(f"share={share} is not a fraction of the time; legal: 0 to 1; nearest: {nearest:g}")
    return 1 / (1 - share + share / speedup)


def check_counting(tiling: str, schedule: str) -> None:
    """Raise ValueError, with the nearest, for a tiling or a schedule that there is not."""
    check_choice("tiling", tiling, _TILINGS)
    check_choice("schedule", schedule, _SCHEDULES)


def simulate(
    canvas_shape: Sequence[int],
    axes: Sequence[AxisWindow],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    *,
    tiling: Tiling = "static",
    schedule: Schedule = "worst",
) -> Simulation:
    """Count visited tiles of a neighbourhood on a canvas; source: GNA section "NATTENSim" (arXiv 2504.16922).

    canvas_shape: tokens per axis, e.g. (30, 48, 80). axes: one window rule per axis. q_tile, kv_tile: tokens of a
    query and a key tile per axis (ragged last tiles are counted whole). tiling: "static" key tiles lie on the canvas
    grid, "dynamic" ones start where the window starts. schedule: whether `op_speedup` follows the busiest tile or
    the average one. Dilation groups are tiled apart, each with its own length.

    Raises ValueError for tiles or windows of another rank, a stride beyond its window, a window beyond its axis.
    """
    check_counting(tiling, schedule)
    check_axes(canvas_shape, axes)
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        check_tile(name, tile, canvas_shape)
    counted = [
        visit_axis(length, window, tq, tk, tiling)
        for length, window, tq, tk in zip(canvas_shape, axes, q_tile, kv_tile, strict=True)
    ]
    return Simulation(axes=tuple(counted), tiling=tiling, schedule=schedule)
