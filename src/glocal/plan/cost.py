"""Forecast attention time from block counts: `t0 + full_blocks * a + partial_blocks * b + imbalance`, plus copies.

Block counts are exact (the simulator or a plan); the constants come from a device table or from a fit to a few timed
calls. Nothing here runs a kernel.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from glocal._errors import check_choice
from glocal.plan.devices.table import (
    FLOPS_PER_PAIR,
    DeviceTable,
    Direction,
    Measurement,
    Rate,
    device_names,
    device_table,
    load_table,
    user_tables,
)
from glocal.plan.simulate import Simulation
from glocal.plan.time_model import TimeModel, TimeSample, fit_time_model

__all__ = [
    "BlockWork",
    "DeviceTable",
    "Forecast",
    "Measurement",
    "Rate",
    "TimeModel",
    "TimeSample",
    "device_names",
    "device_table",
    "fit_time_model",
    "forecast",
    "imbalance",
    "load_table",
    "user_tables",
]

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_TENSORS_MOVED = {"forward": 4, "backward": 8}  # q k v in, out back; and q k v out dout in, dq dk dv back


@dataclass(frozen=True)
class BlockWork:
    """Work of one head: what a plan or a simulation counts. rows: key blocks of each query block, if known."""

    tokens: int
    kv_tokens: int
    block_pairs: int  # pairs of one block, q tokens x kv tokens
    full_blocks: int
    partial_blocks: int
    visible_pairs: int
    rows: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, simulation: Simulation) -> BlockWork:
        """Counts of a simulation, forward or backward alike (the blocks are the same)."""
        rows = torch.ones(1, dtype=torch.int64)
        for axis in simulation.axes:
            rows = (rows[:, None] * torch.tensor(axis.visits)).flatten()  # [query tiles]
        return cls(
            tokens=simulation.tokens,
            kv_tokens=simulation.tokens,
            block_pairs=math.prod(simulation.q_tile) * math.prod(simulation.kv_tile),
            full_blocks=simulation.full_blocks,
            partial_blocks=simulation.partial_blocks,
            visible_pairs=simulation.visible_pairs,
            rows=tuple(rows.tolist()),
        )


@dataclass(frozen=True)
class Forecast:
    """Seconds of one operator call, term by term. Operator figures: they say nothing about a step or a sample."""

    device: str
    kernel: str
    dense_kernel: str
    seconds: float
    dense_seconds: float
    ideal_seconds: float  # visible pairs alone at the dense rate
    launch: float
    full: float
    partial: float
    imbalance: float
    reorder: float
    routing: float
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """Dense over sparse."""
        return self.dense_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain record for JSON and tables."""
        return {**asdict(self), "notes": list(self.notes), "speedup": self.speedup}


def forecast(
    work: Simulation | BlockWork,
    heads: int,
    head_dim: int,
    device: DeviceTable | str,
    *,
    dtype: str = "bfloat16",
    direction: Direction = "forward",
    reorder: bool = True,
    routing_seconds: float = 0.0,
) -> Forecast:
    """Forecast one attention call on a device of the table; the fastest measured kernel that can do it is taken.

    heads: heads times batch. head_dim: D. reorder: whether q, k, v are copied into tile order and the result back.
    routing_seconds: time to choose blocks, for dynamic plans. What the table lacks is written into `notes`.
    Raises ValueError for an unknown device, a dtype without rows, or a use without a measured kernel.
    """
    for name, value in (("heads", heads), ("head_dim", head_dim)):
        if value < 1:
            raise ValueError(f"{name}={value}; legal: at least 1; nearest: 1")
    check_choice("dtype", dtype, _ITEM_BYTES)
    table = device_table(device) if isinstance(device, str) else device
    blocks = BlockWork.of(work) if isinstance(work, Simulation) else work
    flops_per_pair = FLOPS_PER_PAIR[direction] * head_dim * heads

    dense = table.rates("dense", direction, head_dim, blocks.tokens, dtype)
    if not dense:
        raise ValueError(f"device={table.name!r} has no dense {direction} row; measure it with `glocal env --measure`")
    kernel, full_rate, masked_rate = _kernel(blocks, table, direction, head_dim, dtype)
    block_flops = flops_per_pair * blocks.block_pairs
    full = blocks.full_blocks * block_flops / full_rate.flops_per_second
    partial = 0.0 if masked_rate is None else blocks.partial_blocks * block_flops / masked_rate.flops_per_second
    uneven = imbalance(blocks.rows * heads, table.processors) if blocks.rows else 0.0
    launch = 0.0 if table.launch_seconds is None else table.launch_seconds
    moved = _TENSORS_MOVED[direction] * blocks.tokens * heads * head_dim * _ITEM_BYTES[dtype] if reorder else 0
    terms = {
        "launch": launch,
        "full": full,
        "partial": partial,
        "imbalance": uneven * (full + partial),
        "reorder": 2 * moved / table.copy_bytes_per_second,  # read and written
        "routing": routing_seconds,
    }
    dense_rate = dense[0].flops_per_second
    return Forecast(
        device=table.name,
        kernel=kernel,
        dense_kernel=dense[0].kernel,
        seconds=sum(terms.values()),
        dense_seconds=launch + flops_per_pair * blocks.tokens * blocks.kv_tokens / dense_rate,
        ideal_seconds=flops_per_pair * blocks.visible_pairs / dense_rate,
        notes=_notes(table, head_dim, blocks, (dense[0], full_rate, masked_rate)),
        **terms,
    )


def _kernel(
    blocks: BlockWork, table: DeviceTable, direction: Direction, head_dim: int, dtype: str
) -> tuple[str, Rate, Rate | None]:
    """The kernel that finishes these blocks first among those measured for them."""
    full = {rate.kernel: rate for rate in table.rates("full", direction, head_dim, blocks.tokens, dtype)}
    if not blocks.partial_blocks:
        if not full:
            raise ValueError(f"device={table.name!r} has no {direction} row of whole blocks; nearest: forward")
        kernel = next(iter(full))
        return kernel, full[kernel], None
    masked = {
        rate.kernel: rate
        for rate in table.rates("masked", direction, head_dim, blocks.tokens, dtype)
        if rate.kernel in full
    }
    if not masked:
        raise ValueError(
            f"device={table.name!r} has no {direction} row with masked blocks and this work has "
            f"{blocks.partial_blocks} of them; nearest: a stride or tile that is perfectly block sparse"
        )

    def seconds(kernel: str) -> float:
        return (
            blocks.full_blocks / full[kernel].flops_per_second + blocks.partial_blocks / masked[kernel].flops_per_second
        )

    kernel = min(masked, key=seconds)
    return kernel, full[kernel], masked[kernel]


def _notes(
    table: DeviceTable, head_dim: int, blocks: BlockWork, rates: tuple[Rate, Rate, Rate | None]
) -> tuple[str, ...]:
    notes = [f"{table.title}, {table.date}: {table.source}"]
    used = sorted({rate.head_dim for rate in rates if rate is not None and rate.head_dim != head_dim})
    if used:
        notes.append(f"head_dim={head_dim} was not measured; rates are those of {', '.join(map(str, used))}")
    if table.launch_seconds is None:
        notes.append("launch overhead was not measured and counts as 0: small shapes take longer")
    measured = [math.prod(m.q_tile) * math.prod(m.kv_tile) for m in table.measurements if m.kind == "masked"]
    if measured and blocks.block_pairs < min(measured):
        notes.append(
            f"blocks of {blocks.block_pairs:,} pairs are smaller than any measured ({min(measured):,}): kernels run "
            "slower on them than forecast"
        )
    if not blocks.rows:
        notes.append("row lengths unknown: imbalance counts as 0")
    return tuple(notes)


def imbalance(rows: Iterable[int], processors: int) -> float:
    """Time lost to uneven rows, as a share of the even time: 0 when all processors finish together.

    rows: key blocks of each query block, in launch order; each row goes to the processor that is free first.
    """
    if processors < 1:
        raise ValueError(f"processors={processors}; legal: at least 1; nearest: 1")
    free = [0] * processors
    total = 0
    for row in rows:
        heapq.heapreplace(free, free[0] + row)
        total += row
    return max(free) * processors / total - 1 if total else 0.0
