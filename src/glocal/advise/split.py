"""Parts of a set of samples that share neither arguments nor seeds with each other.

Samples are points (arguments, seed). If enough of them differ pairwise in both, every part gets such samples; else
whole groups that hang together by equal arguments or seeds are dealt out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar


class Seeded(Protocol):
    """What has arguments (as text) and a seed."""

    @property
    def key(self) -> str: ...
    @property
    def seed(self) -> int: ...


T = TypeVar("T", bound=Seeded)


def shuffled(samples: Sequence[T]) -> list[T]:
    """The samples in an order that depends on their content alone."""
    return sorted(samples, key=lambda s: hashlib.sha256(f"{s.seed} {s.key}".encode()).hexdigest())


def apart(points: Sequence[tuple[Hashable, Hashable]], sizes: Sequence[int]) -> list[list[int]] | None:
    """Indices of one part for each of `sizes`; points of two parts differ in both coordinates. None if not found."""
    single = matching(points)
    if len(single) >= sum(sizes):
        parts, start = [], 0
        for size in sizes:
            parts.append(sorted(single)[start : start + size])
            start += size
        return parts
    return _deal(groups(points), sizes)


def matching(points: Sequence[tuple[Hashable, Hashable]]) -> list[int]:
    """A largest set of points that differ pairwise in both coordinates (augmenting paths on a bipartite graph)."""
    edges: dict[Hashable, list[int]] = {}
    for number, (left, _) in enumerate(points):
        edges.setdefault(left, []).append(number)
    taken: dict[Hashable, int] = {}  # second coordinate -> point

    for start in edges:
        # Breadth first over first coordinates: `via` is the point that led to a second coordinate.
        via: dict[Hashable, int] = {}
        queue, end = [start], None
        while queue and end is None:
            left = queue.pop(0)
            for number in edges[left]:
                right = points[number][1]
                if right in via:
                    continue
                via[right] = number
                if right not in taken:
                    end = right
                    break
                queue.append(points[taken[right]][0])
        while end is not None:
            number = via[end]
            left = points[number][0]
            before = next((r for r, n in taken.items() if points[n][0] == left and r != end), None)
            taken[end] = number
            if left == start:
                break
            end = before
    return list(taken.values())


def groups(points: Sequence[tuple[Hashable, Hashable]]) -> list[list[int]]:
    """Points that hang together by an equal first or second coordinate, largest group first."""
    parent = list(range(len(points)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[tuple[int, Hashable], int] = {}
    for number, point in enumerate(points):
        for axis, value in enumerate(point):
            parent[root(number)] = root(seen.setdefault((axis, value), number))
    found: dict[int, list[int]] = {}
    for number in range(len(points)):
        found.setdefault(root(number), []).append(number)
    return sorted(found.values(), key=len, reverse=True)


def _deal(found: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[int]] | None:
    """Each group, largest first, goes to the part that still lacks most."""
    parts: list[list[int]] = [[] for _ in sizes]
    for group in found:
        lacks = [size - len(part) for size, part in zip(sizes, parts, strict=True)]
        most = max(range(len(sizes)), key=lambda p: lacks[p])
        if lacks[most] > 0:
            parts[most] += list(group[: lacks[most]])
    return parts if all(len(p) == s for p, s in zip(parts, sizes, strict=True)) else None
