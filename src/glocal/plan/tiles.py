"""Which tiles and strides exist, and which of them suit a pattern (after GNA, arXiv 2504.16922)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glocal.patterns.axis import AxisWindow
from glocal.plan.axis_visits import AxisVisits, Tiling, visit_axis
from glocal.plan.checks import check_axes, size_text
from glocal.plan.simulate import Schedule, Simulation, check_counting, simulate

TILE_SIZES = (64, 128, 256)


def legal_tiles(size: int, rank: int, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """All tiles of exactly `size` tokens whose sides fit the canvas, e.g. (4, 4, 8) for 128 tokens in 3-D.

    shape: canvas, `rank` axes. Sides need not divide their axis (the last tile is then ragged).
    Raises ValueError if the rank is wrong or no tile of that size fits.
    """
    if len(shape) != rank:
        raise ValueError(f"rank={rank} for the canvas {size_text(shape)}; legal and nearest: {len(shape)}")
    if size < 1:
        raise ValueError(f"size={size}; legal: at least 1 token; nearest: 1")
    tiles = tuple(_factor(size, tuple(shape)))
    if not tiles:
        nearest = _nearest_size(size, tuple(shape))
        raise ValueError(
            f"size={size}: no tile of {size} tokens fits the canvas {size_text(shape)}; "
            f"legal: products of sides no longer than its axes; nearest: {nearest}"
        )
    return tiles


def _factor(size: int, shape: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Ordered factorisations of `size` with side i at most shape[i]."""
    if len(shape) == 1:
        if size <= shape[0]:
            yield (size,)
        return
    for side in range(1, min(size, shape[0]) + 1):
        if size % side == 0:
            for rest in _factor(size // side, shape[1:]):
                yield (side, *rest)


def _nearest_size(size: int, shape: tuple[int, ...]) -> int:
    """Largest smaller size that has a tile; 1 always has one."""
    candidate = min(size - 1, math.prod(shape))
    while not any(True for _ in _factor(candidate, shape)):
        candidate -= 1
    return candidate


@dataclass(frozen=True)
class TileSearch:
    """The best tile pairs, fastest first (`effective_speedup`, so that ragged tiles pay for their padding)."""

    considered: int
    best: tuple[Simulation, ...]


def search_tiles(
    canvas_shape: Sequence[int],
    axes: Sequence[AxisWindow],
    *,
    q_sizes: Sequence[int] = TILE_SIZES,
    kv_sizes: Sequence[int] = TILE_SIZES,
    tiling: Tiling = "static",
    schedule: Schedule = "worst",
    top: int = 5,
) -> TileSearch:
    """Try every legal pair of a query and a key tile and keep the `top` best.

    Only counts are compared: small tiles waste least, but their kernels run at a lower rate, so compare pairs of one
    size or weigh them with `plan.cost.forecast`. Sizes that do not fit the canvas are left out unless none fits.
    """
    check_counting(tiling, schedule)
    check_axes(canvas_shape, axes)
    shape = tuple(canvas_shape)
    q_tiles = _tiles_of(q_sizes, shape)
    kv_tiles = _tiles_of(kv_sizes, shape)
    counted: dict[tuple[int, int, int], AxisVisits] = {}  # pairs share most of their sides

    def count(axis: int, tq: int, tk: int) -> AxisVisits:
        key = (axis, tq, tk)
        if key not in counted:
            counted[key] = visit_axis(shape[axis], axes[axis], tq, tk, tiling)
        return counted[key]

    simulations = [
        Simulation(
            axes=tuple(count(axis, tq, tk) for axis, (tq, tk) in enumerate(zip(q_tile, kv_tile, strict=True))),
            tiling=tiling,
            schedule=schedule,
        )
        for q_tile in q_tiles
        for kv_tile in kv_tiles
    ]
    simulations.sort(key=lambda s: (-s.effective_speedup, s.waste, s.q_tile, s.kv_tile))
    return TileSearch(considered=len(simulations), best=tuple(simulations[:top]))


def _tiles_of(sizes: Sequence[int], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    tiles = [tile for size in sizes for tile in _factor(size, shape)]
    if not tiles:
        return list(legal_tiles(min(sizes), len(shape), shape))  # raises with the nearest size
    return tiles


@dataclass(frozen=True)
class StrideSearch:
    """Strides worth using: `front` trades fineness for speed, `perfect` is the finest that needs no mask at all.

    Fineness is the number of queries that share one window, the product of the strides: 1 is a sliding window.
    """

    considered: int
    front: tuple[Simulation, ...]  # finest first, each faster than all before it
    perfect: Simulation | None


def search_strides(
    canvas_shape: Sequence[int],
    axes: Sequence[AxisWindow],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    *,
    tiling: Tiling = "static",
    schedule: Schedule = "worst",
) -> StrideSearch:
    """Weigh all strides up to the window on every axis (the strides of `axes` are ignored).

    Exact without trying all combinations: the speed-up is a product over axes and so is the number of queries that
    share a window, hence a stride that is coarser and not faster than another on its own axis is never on the front.
    """
    plain = [_with_stride(rule, 1) for rule in axes]
    simulate(canvas_shape, plain, q_tile, kv_tile, tiling=tiling, schedule=schedule)  # validates all arguments
    choices: list[list[AxisVisits]] = []
    perfect: list[AxisVisits | None] = []
    for length, rule, tq, tk in zip(canvas_shape, plain, q_tile, kv_tile, strict=True):
        front: list[AxisVisits] = []
        whole: AxisVisits | None = None
        for stride in range(1, rule.window + 1):
            visits = visit_axis(length, _with_stride(rule, stride), tq, tk, tiling)
            if not front or _load(visits, schedule) < _load(front[-1], schedule):
                front.append(visits)
            if whole is None and visits.perfect:
                whole = visits
        choices.append(front)
        perfect.append(whole)
    found = [axis for axis in perfect if axis is not None]
    return StrideSearch(
        considered=math.prod(rule.window for rule in plain),
        front=_front(choices, tiling, schedule),
        perfect=Simulation(tuple(found), tiling, schedule) if len(found) == len(perfect) else None,
    )


def _load(visits: AxisVisits, schedule: Schedule) -> int:
    return max(visits.visits) if schedule == "worst" else sum(visits.visits)


def _front(choices: list[list[AxisVisits]], tiling: Tiling, schedule: Schedule) -> tuple[Simulation, ...]:
    """Combine axes one by one, keeping only combinations no finer one beats."""
    kept: list[tuple[int, int, tuple[AxisVisits, ...]]] = [(1, 1, ())]  # shared queries, load, axes
    for axis in choices:
        grown = [
            (shared * visits.window.stride, load * _load(visits, schedule), (*done, visits))
            for shared, load, done in kept
            for visits in axis
        ]
        grown.sort(key=lambda item: (item[0], item[1], [a.window.stride for a in item[2]]))
        kept = []
        for item in grown:
            if not kept or item[1] < kept[-1][1]:
                kept.append(item)
    return tuple(Simulation(done, tiling, schedule) for _, _, done in kept)


def _with_stride(rule: AxisWindow, stride: int) -> AxisWindow:
    return AxisWindow(rule.window, stride, rule.dilation, rule.causal, rule.border)
