"""Windows of many tokens as dense attention on folded batches: nothing is masked and nothing is padded.

Where a window holds thousands of tokens (UltraGen, arXiv 2510.18775: all frames of a sixteenth of the plane) dense
kernels run at full speed on ``batch x windows``. The last window of an axis may be shorter, and a rolled map has
shorter ones at its seam, so windows are grouped by their size and every group is one dense call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from math import prod

from torch import Tensor

from glocal.ops.attention import attention
from glocal.patterns.windows import AxisRuns, Windows

Group = tuple[int, int, int]
"""First token, number of windows and tokens of a window: runs of equal length that lie side by side on one axis."""


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Windows, axes: Sequence[int], *, backend: str = "auto"
) -> Tensor:
    """`glocal.ops.attention` with `pattern` on a grid in raster order, by folding.

    q, k, v: [B, H, N, D], N the product of `axes`. backend: of the dense calls.
    Returns [B, H, N, Dv], differentiable. Raises ValueError for windows that wrap around without a mask (no group of
    them is a box), and for another number of tokens.
    """
    axes = tuple(axes)
    if q.shape[-2] != prod(axes):
        raise ValueError(f"window_attention: {q.shape[-2]} tokens fill no grid of {axes}; legal: {prod(axes)}.")
    groups = axis_groups(pattern, axes)
    if all(len(g) == 1 for g in groups):
        return _folded(q, k, v, axes, tuple(g[0] for g in groups), backend)
    out = q.new_empty(*q.shape[:2], *axes, v.shape[-1])
    maps = [t.unflatten(2, axes) for t in (q, k, v)]  # [B, H, *axes, D]
    boxes: list[tuple[tuple[slice, ...], Tensor]] = []
    for choice in product(*groups):
        box = (slice(None), slice(None), *(slice(start, start + n * size) for start, n, size in choice))
        parts = [t[box].flatten(2, -2) for t in maps]
        sides = tuple(n * size for _, n, size in choice)
        found = _folded(parts[0], parts[1], parts[2], sides, choice, backend)
        boxes.append((box, found.unflatten(2, sides)))
    for box, found in boxes:
        out[box] = found
    return out.flatten(2, -2)


def window_pairs(pattern: Windows, axes: Sequence[int]) -> int:
    """Pairs of a query and a key that see each other."""
    return prod(sum(n * size**2 for _, n, size in groups) for groups in axis_groups(pattern, axes))


def axis_groups(pattern: Windows, axes: Sequence[int]) -> tuple[tuple[Group, ...], ...]:
    """The windows of every axis, neighbours of equal length as one group."""
    found: list[tuple[Group, ...]] = []
    for length, relation in zip(axes, pattern.axes(axes), strict=True):
        if not isinstance(relation, AxisRuns):
            raise ValueError(
                f"window_attention: roll={pattern.roll!r} with masked=False joins both ends of an axis; legal: "
                "masked=True, or glocal.ops.attention."
            )
        size, roll = relation.size, relation.roll
        wrapped = (
            range(-((length - roll) % size), roll, size) if roll else ()
        )  # the run that the seam cuts begins before token 0
        starts = [*(max(start, 0) for start in wrapped), *range(roll, length, size), length]
        groups: list[Group] = []
        for first, after in pairwise(starts):
            if groups and groups[-1][2] == after - first:
                groups[-1] = (groups[-1][0], groups[-1][1] + 1, after - first)
            else:
                groups.append((first, 1, after - first))
        found.append(tuple(groups))
    return tuple(found)


def _folded(q: Tensor, k: Tensor, v: Tensor, axes: tuple[int, ...], groups: tuple[Group, ...], backend: str) -> Tensor:
    """Equal windows that fill a box: [B, H, N, D] -> [B, H, N, Dv]."""
    counts, sizes = [n for _, n, _ in groups], [size for _, _, size in groups]
    if prod(counts) == 1:
        return attention(q, k, v, backend=backend)
    rank, batch, heads = len(axes), q.shape[0], q.shape[1]
    inside = [x for pair in zip(counts, sizes, strict=True) for x in pair]  # count, size of each axis in turn
    there = (0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2), 2 + 2 * rank)
    folded = [t.unflatten(2, inside).permute(there).reshape(-1, heads, prod(sizes), t.shape[-1]) for t in (q, k, v)]
    out = attention(folded[0], folded[1], folded[2], backend=backend)  # [B * windows, H, tokens, Dv]
    back = [there.index(axis) for axis in range(len(there))]
    return out.reshape(batch, *counts, heads, *sizes, -1).permute(back).reshape(batch, heads, prod(axes), -1)
