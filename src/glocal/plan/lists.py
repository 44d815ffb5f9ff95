"""Block lists from what a router leaves on the device, without waiting for it: every shape is known beforehand.

Three operators, each in plain torch here; on CUDA `glocal.kernels.planning` puts a Triton kernel in the place of each.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("glocal::compact", mutates_args=())
def compact(picked: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Bool [U, rows, columns] to count int32 [U, rows] and index int32 [U, rows, most]: picked columns in rising order,
    then zeros. A row that picks more than `most` keeps its first `most`; callers see to it.
    """
    count = picked.sum(-1, dtype=torch.int32).clamp(max=most)
    front = (~picked).int().argsort(dim=-1, stable=True)[..., :most]
    live = torch.arange(front.shape[-1], device=picked.device) < count[..., None]
    index = torch.zeros(*count.shape, most, dtype=torch.int32, device=picked.device)
    index[..., : front.shape[-1]] = torch.where(live, front, 0)
    return count, index


@compact.register_fake
def _(picked: Tensor, most: int) -> tuple[Tensor, Tensor]:
    shape = picked.shape[:2]
    return picked.new_empty(shape, dtype=torch.int32), picked.new_empty((*shape, most), dtype=torch.int32)


@torch.library.custom_op("glocal::compact_columns", mutates_args=())
def compact_columns(picked: Tensor) -> tuple[Tensor, Tensor]:
    """The other way round: bool [U, rows, columns] to count [U, columns] and index [U, columns, rows]."""
    count, index = compact(picked.transpose(1, 2).contiguous(), picked.shape[1])
    return count, index


@compact_columns.register_fake
def _(picked: Tensor) -> tuple[Tensor, Tensor]:
    u, rows, columns = picked.shape
    return picked.new_empty((u, columns), dtype=torch.int32), picked.new_empty((u, columns, rows), dtype=torch.int32)


@torch.library.custom_op("glocal::rising", mutates_args=())
def rising(index: Tensor, count: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` entries of each row in rising order, ties by place, and the place each came from.

    index: int32 [U, rows, most]; count: int32 [U, rows]. Entries outside 0 .. columns - 1 are left out. Returns the
    entries left (0 beyond their count) and their places, both int32 [U, rows, most], and their counts, int32 [U, rows].
    """
    return plain_rising(index, count, columns)


@rising.register_fake
def _(index: Tensor, count: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    found = [torch.empty_like(t, dtype=torch.int32) for t in (index, index, count)]
    return found[0], found[1], found[2]


def plain_rising(index: Tensor, count: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """`rising` in plain torch, for rows of any length."""
    live = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    live &= (index >= 0) & (index < columns)
    place = torch.where(live, index, columns).argsort(dim=-1, stable=True)
    found = torch.where(live, index, 0).gather(-1, place)
    return found.int(), place.int(), live.sum(-1, dtype=torch.int32)
