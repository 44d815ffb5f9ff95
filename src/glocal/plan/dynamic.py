"""A plan from a map of picked blocks, as routers leave it on the device, without waiting for it."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from glocal.canvas import Layout
from glocal.plan.blockplan import BlockLists, BlockPlan
from glocal.plan.facts import declare_turned
from glocal.plan.lists import compact, compact_columns
from glocal.plan.selection import PadTable, assemble, assemble_lists, known_pads, padded
from glocal.routing.partition import Partition
from glocal.routing.selection import Selection


def plan_blocks(
    picked: Tensor,
    layout: Layout,
    q_part: Partition,
    kv_part: Partition,
    *,
    most: int | None = None,
    backward: bool = False,
) -> BlockPlan:
    """A BlockPlan of the picked pairs of groups; every shape is known beforehand, so a CUDA graph can hold it.

    picked: bool [batch|1, heads|1, query groups, key groups], such as ``scores >= threshold``.
    q_part, kv_part: the groups; those that follow from a canvas (`Partition.blocks`) cost no wait.
    most: width of the lists; None is the number of key groups. A row that picks more keeps its first `most`, so leave
        it out unless the picks are known to be that few (a top-k of k).
    backward: also make the lists by key group that gradients need, unless some group has pads.
    Raises ValueError where the map does not fit the groups.
    """
    if picked.dim() != 4 or picked.shape[2:] != (q_part.groups, kv_part.groups):
        raise ValueError(
            f"plan_blocks: picked of shape {tuple(picked.shape)} must be [batch|1, heads|1, {q_part.groups}, "
            f"{kv_part.groups}] for {q_part!r} and {kv_part!r}."
        )
    if picked.dtype.is_floating_point or picked.dtype.is_complex:
        raise ValueError(f"plan_blocks: picked is {picked.dtype}; legal: bool, for example scores >= threshold.")
    q_part, kv_part = q_part.to(picked.device), kv_part.to(picked.device)
    lead = picked.shape[0], picked.shape[1]
    flat = picked.bool().reshape(prod(lead), *picked.shape[2:])  # [U, query groups, key groups]
    width = kv_part.groups if most is None else most
    pads = known_pads(q_part, kv_part)
    if pads is not None:
        lists = _split(flat, pads, width)
        none = flat.new_zeros(*lead, flat.shape[1], 0, dtype=torch.int32)
        selection = Selection(layout, q_part, kv_part, none, none.sum(-1, dtype=torch.int32))
        return assemble_lists(selection, lead, lists, pads.masks)
    count, index = compact(flat, width)
    selection = Selection(layout, q_part, kv_part, index.unflatten(0, lead), count.unflatten(0, lead))
    found = padded(selection)
    made = assemble(selection, found, rising_already=True)
    if backward and found.state is None and found.index.shape[:2] == lead:
        declare_turned(made.full.index, compact_columns(flat))
    return made


def _split(flat: Tensor, pads: PadTable, width: int) -> tuple[BlockLists, BlockLists]:
    """Lists of the columns without pads, and of those with some, which are few; each in one pass over the map."""
    kind = pads.which_k[0, 0]
    every, some = pads.every[kind], pads.some[kind]
    full = BlockLists(*compact(flat & every, width))
    partial = BlockLists(*compact(flat & (some & ~every), min(pads.padded, width)))
    rows = pads.which_q[0, 0][:, None] * pads.kinds + kind[partial.index.long()]
    return full, replace(partial, mask=torch.where(partial.live, rows, 0).int())
