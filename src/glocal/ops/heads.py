"""Different operators for different heads: HiLo (arXiv 2205.13213) gives some heads windows and others pooled keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.ops.attention import Attended, attention

Run = Callable[[Tensor, Tensor, Tensor], "Tensor | Attended"]


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """heads: query heads, a slice or a list. run: what computes them from their q, k, v, or keyword arguments of
    `glocal.ops.attention` (pattern, canvas, score, backend).

    k, v: keys and values of this group alone, [..., heads of the group or a divisor, Nk, D]; None takes the shared
    ones that belong to its heads. Groups may differ in key length.
    """

    heads: slice | Sequence[int]
    run: Run | Mapping[str, Any]
    k: Tensor | None = None
    v: Tensor | None = None


def heads(
    groups: Sequence[HeadGroup | tuple[slice | Sequence[int], Run | Mapping[str, Any]]],
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor:
    """Run every group on its heads and concatenate the results in the given order, [..., Hq, Nq, Dv].

    groups: `HeadGroup` records or (heads, run) pairs; together they name each query head exactly once. Groups listed
        out of order give heads out of order, as published code with its halves swapped needs.
    q: [..., Hq, Nq, D]; k, v: [..., Hkv, Nk, D], shared by the groups that bring none of their own.
    """
    count = q.shape[-3]
    records = [g if isinstance(g, HeadGroup) else HeadGroup(*g) for g in groups]
    numbers = [list(range(count))[g.heads] if isinstance(g.heads, slice) else list(g.heads) for g in records]
    _check([n for group in numbers for n in group], numbers, count)
    out = []
    for group, mine in zip(records, numbers, strict=True):
        if not mine:
            continue
        k_, v_ = (_own(t, s, mine, count, n) for t, s, n in ((group.k, k, "k"), (group.v, v, "v")))
        found = _run(group.run, _take(q, mine), k_, v_)
        found = found.out if isinstance(found, Attended) else found
        if found.shape[-3] != len(mine):
            raise ValueError(f"heads: the branch of heads {mine} returned {found.shape[-3]} heads, not {len(mine)}.")
        out.append(found)
    return torch.cat(out, -3)


def _run(run: Run | Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor | Attended:
    return attention(q, k, v, **run) if isinstance(run, Mapping) else run(q, k, v)


def _check(flat: list[int], numbers: list[list[int]], count: int) -> None:
    twice = sorted({n for n in flat if flat.count(n) > 1})
    missing = sorted(set(range(count)) - set(flat))
    foreign = sorted(set(flat) - set(range(count)))
    for found, words in ((twice, "are in two groups"), (missing, "are in no group"), (foreign, "do not exist")):
        if found:
            raise ValueError(
                f"heads: heads {found} {words}; the groups {numbers} must name each of the {count} query heads once."
            )


def _own(own: Tensor | None, shared: Tensor | None, mine: list[int], count: int, name: str) -> Tensor:
    """Keys or values of one group."""
    if own is not None:
        return own
    if shared is None:
        raise ValueError(f"heads: the group of heads {mine} has no {name}; give {name}= to the group or to heads().")
    ratio = count // shared.shape[-3]
    if shared.shape[-3] * ratio != count:
        raise ValueError(f"heads: {count} query heads do not divide over {shared.shape[-3]} heads of {name}.")
    theirs = [n // ratio for n in mine]
    if theirs[::ratio] != [t for i, t in enumerate(theirs) if i == 0 or t != theirs[i - 1]] or len(theirs) % ratio != 0:
        raise ValueError(
            f"heads: group {mine} splits query heads that share a head of {name} ({ratio} to 1); cut between groups "
            f"of {ratio}."
        )
    return _take(shared, theirs[::ratio])


def _take(x: Tensor, numbers: list[int]) -> Tensor:
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return x.narrow(-3, numbers[0], len(numbers))
    return x.index_select(-3, torch.tensor(numbers, device=x.device))
