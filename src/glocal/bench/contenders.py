"""Sensible instances of every pattern for one canvas, at about the same share of visible pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import log, prod

from glocal._errors import nearest
from glocal.patterns import (
    Axial,
    Causal,
    CausalWindow,
    Grid,
    Neighborhood,
    Pattern,
    RadialBlocks,
    RadialTokens,
    StridedShards,
    TileWindows,
    Windows,
    frame,
    per_head,
)
from glocal.routing import Keep, PooledTopK


@dataclass(frozen=True)
class Contender:
    """What takes part: a pattern, or a router that looks at q and k. what: its parameters in words."""

    name: str
    what: str
    method: Pattern | PooledTopK


def contenders(
    shape: Sequence[int], heads: int, keep: float = 0.25, names: Sequence[str] | None = None
) -> list[Contender]:
    """Every pattern that exists on a grid of axis lengths `shape`, with windows chosen so that about `keep` of all
    pairs are visible. Radial, axial and causal attention keep what their rule says.

    names: a selection. Raises ValueError for an unknown name (with the nearest) or a share outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r}; legal: above 0 and at most 1, such as 0.25.")
    found = {c.name: c for c in _all(tuple(shape), heads, keep)}
    if names is None:
        return list(found.values())
    for name in names:
        if name not in found:
            raise ValueError(
                f"pattern {name!r} is none of those for a canvas of {len(shape)} axes: {'; '.join(found)}; "
                f"nearest: {nearest(name, found)}."
            )
    return [found[name] for name in dict.fromkeys(names)]


def fit(lengths: Sequence[int], keep: float, most: Sequence[int] | None = None) -> tuple[int, ...]:
    """Whole numbers per axis, 1 to `most` (default the length), whose product is nearest to `keep` of all."""
    caps = list(lengths) if most is None else list(most)
    free, share = set(range(len(lengths))), keep
    while True:  # an axis that cannot give its part leaves it to the others
        each = share ** (1 / len(free)) if free else 1.0
        tight = {a for a in free if caps[a] < lengths[a] * each}
        if not tight:
            break
        free -= tight
        share = min(1.0, share / prod(caps[a] / lengths[a] for a in tight))
    choices = []
    for axis, (length, cap) in enumerate(zip(lengths, caps, strict=True)):
        wanted = length * each if axis in free else cap
        choices.append(sorted({min(cap, max(1, n)) for n in (int(wanted), int(wanted) + 1)}))
    target = log(keep * prod(lengths))
    return min(product(*choices), key=lambda n: (abs(log(prod(n)) - target), max(n) - min(n)))


def parts(lengths: Sequence[int], keep: float) -> tuple[int, ...]:
    """Divisors per axis whose product is nearest to `keep` of all, the squarest of equally near ones."""
    choices = [[d for d in range(1, n + 1) if n % d == 0] for n in lengths]
    target = log(keep * prod(lengths))
    return min(product(*choices), key=lambda n: (round(abs(log(prod(n)) - target), 6), max(n) - min(n), n))


def box(shape: Sequence[int], tokens: int = 64) -> tuple[int, ...]:
    """The squarest box of at most `tokens` tokens (a power of two), sides doubled in turn, inside the grid."""
    sides = [1] * len(shape)
    while prod(sides) < tokens:
        room = [a for a, n in enumerate(shape) if sides[a] * 2 <= n]
        if not room:
            break
        axis = min(room, key=lambda a: (sides[a], -a))
        sides[axis] *= 2
    return tuple(sides)


def _words(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _all(shape: tuple[int, ...], heads: int, keep: float) -> list[Contender]:
    rank, tokens = len(shape), prod(shape)
    window, tile = fit(shape, keep), box(shape)
    size = parts(shape, keep)
    roll = tuple(w // 2 for w in size)
    tiles = fit([-(-n // t) for n, t in zip(shape, tile, strict=True)], keep)
    steps = [2 if n >= 4 else 1 for n in shape[:1]] + [1] * (rank - 1)
    whole = tuple(min(n, c * t) for n, c, t in zip(shape, tiles, tile, strict=True))
    spread = fit(shape, keep, [n // s for n, s in zip(shape, steps, strict=True)])
    local, some = Neighborhood(window), Keep(ratio=keep, at_least=1)  # a small canvas may be one tile
    out = [
        Contender("neighborhood", f"window {_words(window)}", local),
        Contender("neighborhood, strided", f"window {_words(whole)}, stride {_words(tile)}", Neighborhood(whole, tile)),
        Contender(
            "neighborhood, dilated",
            f"window {_words(spread)}, dilation {_words(steps)}",
            Neighborhood(spread, 1, tuple(steps)),
        ),
        Contender(
            "neighborhood + first",
            f"window {_words(window)}, all see place 0 of axis 0",
            local | frame(0),
        ),
        Contender("windows", f"size {_words(size)}", Windows(size)),
        Contender("windows, shifted", f"size {_words(size)}, roll {_words(roll)}", Windows(size, roll=roll)),
        Contender("tile windows", f"{_words(tiles)} tiles of {_words(tile)}", TileWindows(tile, tiles)),
        Contender("grid", f"size {_words(size)}", Grid(size)),
        Contender("causal", "raster order", Causal()),
        Contender(
            "causal window", f"{max(1, round(keep * tokens))} tokens", CausalWindow(max(1, round(keep * tokens)))
        ),
        Contender("pooled top-k", f"{keep:.3g} of the tiles of {_words(tile)}", PooledTopK(tile, some)),
    ]
    if rank > 1:
        cross: Pattern = Axial(0)
        for axis in range(1, rank):
            cross = cross | Axial(axis)
        out += [
            Contender("axial", "lines along every axis", cross),
            Contender("radial", "token form with sink", RadialTokens()),
            Contender("radial, blocks", "published form, blocks of 64", RadialBlocks(64)),
        ]
    if rank > 1 and heads > 1:
        near = (fit(shape[:1], keep)[0], *shape[1:])
        far = (shape[0], *fit(shape[1:], keep))
        turns = per_head([Neighborhood(near if head % 2 == 0 else far) for head in range(heads)])
        out.append(Contender("heads in turn", f"windows {_words(near)} and {_words(far)}", turns))
    if rank > 2:
        out.append(Contender("frames", "every place of axis 0 by itself", Axial(tuple(range(1, rank)))))
    if rank == 1 and heads > 1:
        far = max(2, round(1 / keep))
        shards = StridedShards(64, 2, far, heads, causal=False)
        out.append(Contender("strided shards", f"blocks of 64, window 2, every {far}th far block", shards))
    return out
