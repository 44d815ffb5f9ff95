"""Block lists on the device: rows or columns of a map of picked blocks, and rows of entries put in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels.triton.work import on_device, start
from glocal.plan.lists import plain_rising

_WIDE = 4096  # columns of a map that one program holds
_COLUMNS = 8  # columns of a map that one program walks down
_ROWS = 256


@triton.jit
def rows_kernel(picked, count, index, columns, most, WIDE: tl.constexpr):
    """One program a row. Picked columns go to the front in order, zeros behind them."""
    row = tl.program_id(0).to(tl.int64)
    found = 0
    for begin in range(0, columns, WIDE):
        column = begin + tl.arange(0, WIDE)
        here = tl.load(picked + row * columns + column, mask=column < columns, other=0) != 0
        rank = tl.cumsum(here.to(tl.int32), 0)
        place = found + rank - 1
        tl.store(index + row * most + place, column, mask=here & (place < most))
        found += tl.max(rank, 0)
    found = tl.minimum(found, most)
    tl.store(count + row, found)
    for begin in range(0, most, WIDE):
        place = begin + tl.arange(0, WIDE)
        tl.store(index + row * most + place, tl.zeros([WIDE], tl.int32), mask=(place >= found) & (place < most))


@triton.jit
def columns_kernel(picked, count, index, rows, columns, groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program some columns of a list: walks down the rows. Entries beyond a count are zeros."""
    pid = tl.program_id(0)
    u = (pid // groups).to(tl.int64)
    column = pid % groups * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    found = tl.zeros([COLUMNS], tl.int32)
    to = index + (u * columns + column) * rows
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & inside[None, :]
        here = tl.load(picked + (u * rows + row)[:, None] * columns + column[None, :], mask=live, other=0) != 0
        rank = tl.cumsum(here.to(tl.int32), 0)
        place = found[None, :] + rank - 1
        tl.store(to[None, :] + place, tl.broadcast_to(row[:, None], [ROWS, COLUMNS]), mask=here)
        found += tl.sum(here.to(tl.int32), 0)
    tl.store(count + u * columns + column, found, mask=inside)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        behind = (row[:, None] >= found[None, :]) & (row < rows)[:, None] & inside[None, :]
        tl.store(to[None, :] + row[:, None], tl.zeros([ROWS, COLUMNS], tl.int32), mask=behind)


@triton.jit
def rising_kernel(index, count, found, places, left, most, columns, WIDE: tl.constexpr):
    """One program a row of at most WIDE entries; entry and place are sorted as one 64-bit number."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDE)
    entry = tl.load(index + row * most + place, mask=place < most, other=-1)
    live = (place < tl.load(count + row)) & (entry >= 0) & (entry < columns)
    key = tl.where(live, entry, columns).to(tl.int64) * WIDE + place
    key = tl.sort(key, 0)  # places beyond `most` come last
    entry = (key // WIDE).to(tl.int32)
    tl.store(found + row * most + place, tl.where(entry < columns, entry, 0), mask=place < most)
    tl.store(places + row * most + place, (key % WIDE).to(tl.int32), mask=place < most)
    tl.store(left + row, tl.sum(live.to(tl.int32), 0))


def compact(picked: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """As `glocal.plan.lists.compact`."""
    u, rows, columns = picked.shape
    picked = picked.contiguous().view(torch.uint8)
    count = torch.empty(u, rows, dtype=torch.int32, device=picked.device)
    index = torch.empty(u, rows, most, dtype=torch.int32, device=picked.device)
    if count.numel():
        wide = min(_WIDE, max(16, triton.next_power_of_2(max(columns, most, 1))))
        with on_device(picked):
            start(rows_kernel, u * rows, picked, count, index, columns, most, WIDE=wide, num_warps=4)
    return count, index


def compact_columns(picked: Tensor) -> tuple[Tensor, Tensor]:
    """As `glocal.plan.lists.compact_columns`."""
    u, rows, columns = picked.shape
    picked = picked.contiguous().view(torch.uint8)
    count = torch.empty(u, columns, dtype=torch.int32, device=picked.device)
    index = torch.empty(u, columns, rows, dtype=torch.int32, device=picked.device)
    if count.numel():
        groups = -(-columns // _COLUMNS)
        with on_device(picked):
            start(
                columns_kernel, u * groups, picked, count, index, rows, columns, groups,
                ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
            )  # fmt: skip
    return count, index


def rising(index: Tensor, count: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `glocal.plan.lists.rising`; rows of more than 4,096 entries are sorted by torch."""
    most = index.shape[-1]
    if most > _WIDE:
        return plain_rising(index, count, columns)
    index, count = index.int().contiguous(), count.int().contiguous()
    found, places, left = torch.empty_like(index), torch.empty_like(index), torch.zeros_like(count)
    if count.numel() and most:
        wide = max(16, triton.next_power_of_2(most))
        with on_device(index):
            start(
                rising_kernel, count.numel(), index, count, found, places, left, most, columns,
                WIDE=wide, num_warps=1 if wide <= 128 else 4,
            )  # fmt: skip
    return found, places, left
