"""Cut a block plan into batches of equal shape, so that a few large matrix products do the work of many small ones.

A job holds the samples and heads that share lists and orders. Inside a job, query blocks with the same number of
visited key blocks are batched; blocks with the same key list are joined into one longer block, which shares one gather
of the keys. Blocks that need a mask are kept apart from blocks that see whole key blocks only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.kernels.call import PlanTensors
from glocal.plan.blockplan import BlockLists

_NEARLY = 0.85  # share of the key blocks from which a list is widened to all of them


@dataclass(frozen=True)
class Limits:
    """How much one batch may hold: gathered key tokens times members, and scores times members."""

    keys: int
    scores: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """`lists` key lists with `shared` query blocks each: rows start .. start + lists * shared of the job.

    blocks: int64 [lists, m] key blocks. masks: int64 [lists * shared, m] rows of the mask table, None if all is seen.
    """

    start: int
    lists: int
    shared: int
    blocks: Tensor
    masks: Tensor | None


@dataclass(frozen=True, eq=False)
class Job:
    """Samples and heads with equal lists and orders.

    members: int64 [n], sample * units + unit. A unit is a key head with its query heads, or one query head.
    q_tokens: int64 [rows * q_block] in the order of the chunks, -1 pads. k_tokens: int64 [key blocks * kv_block].
    """

    members: Tensor
    q_tokens: Tensor
    k_tokens: Tensor
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Units:
    """How heads are dealt out: `count` units, each one key head with `rows` query heads; `kv_step` units a key head."""

    count: int
    rows: int
    kv_step: int

    @staticmethod
    def of(plan: PlanTensors, q_heads: int, kv_heads: int) -> Units:
        """Key heads where the plan allows it, query heads where every one has a list or an order of its own."""
        heads = max(t.shape[1] for t in (plan.owner, plan.q_order, plan.kv_order))
        if heads in (1, kv_heads):
            return Units(kv_heads, q_heads // kv_heads, 1)
        return Units(q_heads, 1, q_heads // kv_heads)


def jobs(
    plan: PlanTensors, units: Units, batch: int, blocks: tuple[int, int], limits: Limits, portions: int = 1
) -> list[Job]:
    """All work of a plan for `batch` samples. blocks: query and key block sizes.

    portions: so many parts of the members are computed apart; limits hold for each.
    """
    _check(plan, blocks)
    out = []
    for (owner, q_order, kv_order), members in _classes(plan, units, batch).items():
        q_tokens = plan.q_order[q_order].long().reshape(-1, blocks[0])  # [query blocks, q_block]
        together = -(-members.numel() // portions) * units.rows
        rows, chunks = _chunks(plan, owner, together, blocks, limits)
        order = q_tokens[torch.tensor(rows, dtype=torch.long, device=q_tokens.device)].flatten()
        out.append(Job(members.to(q_tokens.device), order, plan.kv_order[kv_order].long(), chunks))
    return out


def _check(plan: PlanTensors, blocks: tuple[int, int]) -> None:
    """Block and mask numbers that point nowhere are refused before anything is read through them."""
    kv_blocks = plan.kv_order.shape[-1] // blocks[1]
    for name, index, count, legal in (
        ("full.index", plan.full_index, plan.full_count, kv_blocks),
        ("partial.index", plan.part_index, plan.part_count, kv_blocks),
        ("partial.mask", plan.part_mask, plan.part_count, plan.masks.shape[0]),
    ):
        if count.numel() and int(count.max()) > index.shape[-1]:
            raise ValueError(
                f"BlockPlan: a count of {int(count.max())} exceeds {name} of width {index.shape[-1]}; "
                f"legal: 0 to {index.shape[-1]}."
            )
        live = BlockLists(count, index).live
        bad = index[live & ((index < 0) | (index >= legal))]
        if bad.numel():
            raise ValueError(f"BlockPlan: {name} holds {int(bad[0])}; legal: 0 to {legal - 1}.")


def _classes(plan: PlanTensors, units: Units, batch: int) -> dict[tuple[int, tuple[int, int], tuple[int, int]], Tensor]:
    """Members by (list, place in q_order, place in kv_order)."""
    tensors = (plan.owner, plan.q_order, plan.kv_order)
    samples, heads = (max(t.shape[axis] for t in tensors) for axis in (0, 1))
    owner = plan.owner.tolist()

    def place(t: Tensor, sample: int, head: int) -> tuple[int, int]:
        return sample if t.shape[0] > 1 else 0, head if t.shape[1] > 1 else 0

    found: dict[tuple[int, tuple[int, int], tuple[int, int]], list[Tensor]] = {}
    every = torch.arange(batch * units.count, device="cpu").reshape(batch, units.count)
    for sample in range(samples):
        for head in range(heads):
            a, b = place(plan.owner, sample, head)
            key = (owner[a][b], place(plan.q_order, sample, head), place(plan.kv_order, sample, head))
            mine = every[sample if samples > 1 else slice(None), head if heads > 1 else slice(None)]
            found.setdefault(key, []).append(mine.flatten())
    return {key: torch.cat(parts) for key, parts in found.items()}


def _chunks(
    plan: PlanTensors, owner: int, members: int, blocks: tuple[int, int], limits: Limits
) -> tuple[list[int], tuple[Chunk, ...]]:
    """Query blocks in batched order, and the batches."""
    lists, masks, total, masked = _joined(plan, owner)
    every = plan.kv_order.shape[-1] // blocks[1]
    lists, masks, total, masked = _widened(lists, masks, total, masked, every, plan.masks.shape[0] + 1)
    steps = [_step(t) if m and t != every else t for t, m in zip(total, masked, strict=True)]
    runs: dict[tuple[bool, int, bytes], list[int]] = {}
    where = lists.cpu().numpy()
    for row, (step, mask) in enumerate(zip(steps, masked, strict=True)):
        if step:
            runs.setdefault((mask, step, where[row, :step].tobytes()), []).append(row)
    shapes: dict[tuple[bool, int, int], list[list[int]]] = {}
    for (mask, step, _), rows in runs.items():
        most = max(1, limits.scores // max(1, members * blocks[0] * blocks[1] * step))
        for begin in range(0, len(rows), most):
            part = rows[begin : begin + most]
            shapes.setdefault((mask, step, len(part)), []).append(part)
    order: list[int] = []
    chunks = []
    for (mask, step, shared), parts in shapes.items():
        keys = max(1, members * step * blocks[1])
        most = max(1, min(limits.keys // keys, limits.scores // (keys * blocks[0] * shared)))
        for begin in range(0, len(parts), most):
            some = parts[begin : begin + most]
            flat = [row for part in some for row in part]
            heads = torch.tensor([part[0] for part in some], device=lists.device)
            ids = masks[torch.tensor(flat, device=lists.device), :step] if mask else None
            chunks.append(Chunk(len(order), len(some), shared, lists[heads, :step], ids))
            order += flat
    return order, tuple(chunks)


def _joined(plan: PlanTensors, owner: int) -> tuple[Tensor, Tensor, list[int], list[bool]]:
    """Full and partial entries of each query block in one row, their masks, how many, and whether masks are needed.

    Full entries point to row M of the mask table (all seen), entries beyond the count to row M + 1 (nothing seen).
    """
    whole, part = plan.full_count[owner].long()[:, None], plan.part_count[owner].long()[:, None]
    room = int((whole + part).max()) if whole.numel() else 0
    width = _step(room)
    column = torch.arange(width, device=whole.device).expand(whole.shape[0], width)
    lists, masks = torch.zeros_like(column), torch.full_like(column, plan.masks.shape[0] + 1)
    for index, first, count, rows in (
        (plan.full_index, torch.zeros_like(whole), whole, None),
        (plan.part_index, whole, part, plan.part_mask),
    ):
        if index.shape[-1] == 0:
            continue
        here = (column >= first) & (column < first + count)
        place = (column - first).clamp(0, index.shape[-1] - 1)
        lists = torch.where(here, index[owner].long().gather(1, place), lists)
        seen = plan.masks.shape[0] if rows is None else rows[owner].long().gather(1, place)
        masks = torch.where(here, seen, masks)
    return lists, masks, (whole + part).flatten().tolist(), (part > 0).flatten().tolist()


def _widened(
    lists: Tensor, masks: Tensor, total: list[int], masked: list[bool], every: int, hidden: int
) -> tuple[Tensor, Tensor, list[int], list[bool]]:
    """Lists that hold nearly all `every` key blocks become lists of all, the missing ones hidden: they share one gather
    of keys as they lie, which costs less than leaving a few blocks out.
    """
    count = torch.tensor(total, device=lists.device)
    place = torch.where(torch.arange(lists.shape[1], device=lists.device) < count[:, None], lists, every)
    times = torch.zeros(len(total), every + 1, dtype=torch.long, device=lists.device)
    times.scatter_add_(1, place, torch.ones_like(place))
    wide = (count >= _NEARLY * every) & (times[:, :every] <= 1).all(1) & (count > 0)
    if not bool(wide.any()):
        return lists, masks, total, masked
    ids = torch.full_like(times, hidden).scatter_(1, place, masks)[:, :every]
    extra = max(0, every - lists.shape[1])
    lists, masks = pad(lists, (0, extra)), pad(masks, (0, extra), value=hidden)
    lists[:, :every] = torch.where(wide[:, None], torch.arange(every, device=lists.device), lists[:, :every])
    masks[:, :every] = torch.where(wide[:, None], ids, masks[:, :every])
    chosen = wide.tolist()
    masked = [m or (w and t < every) for m, w, t in zip(masked, chosen, total, strict=True)]
    return lists, masks, [every if w else t for w, t in zip(chosen, total, strict=True)], masked


def _step(count: int) -> int:
    """Next length on a ladder whose steps are at most an eighth: lists of nearly equal length share a batch."""
    step = max(1, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step
