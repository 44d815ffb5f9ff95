"""Do runs of raster tokens see each other? Exact answers from one-axis tables, without the pairs.

A run of consecutive tokens of a grid is a few boxes; a product of one-axis relations treats the axes of a box apart, so
counts over intervals (two-dimensional prefix sums of each axis table) say whether any pair, or all pairs, are visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from glocal.patterns.base import Term

LIMIT = 2048  # longest axis that gets a length x length table
Box = tuple[tuple[int, int], ...]  # for each axis: first coordinate, one past the last


def split_run(first: int, stop: int, shape: tuple[int, ...]) -> list[Box]:
    """The boxes that raster tokens first..stop-1 of a grid consist of: a head, whole slices, a tail, axis by axis."""
    if first >= stop:
        return []
    if len(shape) == 1:
        return [((first, stop),)]
    size = prod(shape[1:])
    a, b = -(-first // size), stop // size  # whole slices a..b-1
    if a > b:  # inside one slice
        return [((b, b + 1), *box) for box in split_run(first - b * size, stop - b * size, shape[1:])]
    boxes: list[Box] = [((a - 1, a), *box) for box in split_run(first - (a - 1) * size, size, shape[1:])]
    if a < b:
        boxes.append(((a, b), *((0, length) for length in shape[1:])))
    boxes += [((b, b + 1), *box) for box in split_run(0, stop - b * size, shape[1:])]
    return boxes


def runs_see(terms: Sequence[Term], shape: tuple[int, ...], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
    """For rows of token indices q [a, n] and k [b, m] (-1 pads): any pair visible, and surely all pairs; bool [a, b].

    "Surely": every box pair lies inside one term; rows that only the terms together fill are left out. Pads see
    nothing and do not count; a row of pads only sees nothing. None if a row is no run of consecutive tokens or an axis
    is longer than `LIMIT`.
    """
    if max(shape) > LIMIT:
        return None
    mine, theirs = _boxes(q, shape), _boxes(k, shape)
    if mine is None or theirs is None:
        return None
    (q_box, q_row), (k_box, k_row) = mine, theirs  # [boxes, axes, 2], [boxes]
    some = torch.zeros(q_row.numel(), k_row.numel(), dtype=torch.bool, device=q.device)
    every = torch.zeros_like(some)
    for term in terms:
        seen, filled = torch.ones_like(some), torch.ones_like(some)
        for axis, (relation, length) in enumerate(zip(term, shape, strict=True)):
            place = torch.arange(length, device=q.device)
            table = relation.sees(place[:, None], place[None], length).expand(length, length)
            sums = torch.nn.functional.pad(table.int().cumsum(0).cumsum(1), (1, 0, 1, 0))
            (q0, q1), (k0, k1) = (t[:, axis].unbind(-1) for t in (q_box, k_box))
            inside = sums[q1][:, k1] - sums[q0][:, k1] - sums[q1][:, k0] + sums[q0][:, k0]
            seen &= inside > 0
            filled &= inside == (q1 - q0)[:, None] * (k1 - k0)
        some |= seen
        every |= filled
    any_ = _sum_boxes(some, q_row, k_row, (q.shape[0], k.shape[0])) > 0
    return any_, any_ & (_sum_boxes(~every, q_row, k_row, (q.shape[0], k.shape[0])) == 0)


def _boxes(index: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Boxes of all rows, int64 [boxes, axes, 2], and the row of each; None if a row is no run."""
    held = (index >= 0).sum(1)
    first = torch.where(index < 0, prod(shape), index).amin(1)
    last = index.amax(1)
    ordered = (index.diff(dim=1) == 1) | (index[:, 1:] < 0)
    if bool(((held > 0) & (last - first + 1 != held)).any()) or not bool(ordered.all()):
        return None
    rows, boxes = [], []
    for row, (begin, count) in enumerate(zip(first.tolist(), held.tolist(), strict=True)):
        mine = split_run(begin, begin + count, shape) if count else []
        boxes += mine
        rows += [row] * len(mine)
    device = index.device
    whole = torch.tensor(boxes, dtype=torch.long, device=device).reshape(-1, len(shape), 2)  # long even if empty
    return whole, torch.tensor(rows, dtype=torch.long, device=device)


def _sum_boxes(values: Tensor, q_row: Tensor, k_row: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sum of bool [q boxes, k boxes] over the boxes of each row, int32 [rows, rows]."""
    half = torch.zeros(shape[0], values.shape[1], dtype=torch.int32, device=values.device)
    half.index_add_(0, q_row, values.int())
    return torch.zeros(shape, dtype=torch.int32, device=values.device).index_add_(1, k_row, half)
