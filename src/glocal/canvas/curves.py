"""Space-filling curves as lists of grid indices: neighbours on the curve are neighbours in the grid.

`gilbert` fills any 2-D or 3-D box (generalised Hilbert curve, the order of Rectified SpaAttn, arXiv 2511.19835);
`hilbert` is the classical curve of cubes with a power-of-two side; `snake` runs to and fro; `axes` swaps axes
(PAROAttention, arXiv 2506.16054).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from glocal._kept import ordinary

Vector = tuple[int, int, int]


@lru_cache(maxsize=32)
@ordinary()
def gilbert(shape: tuple[int, ...]) -> Tensor:
    """Raster indices of a box of axis lengths `shape` along the generalised Hilbert curve, int64 [tokens].

    The last axis is the major one, as if the box were given as width, height, depth. Consecutive tokens are
    neighbours where the lengths allow; boxes with odd sides cost a few longer steps (under 5 % of all).
    """
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"gilbert: shape={shape} has {len(shape)} axes; legal: 1, 2 or 3.")
    depth, height, width = (1,) * (3 - len(shape)) + shape
    lines = _fill((0, 0, 0), (width, 0, 0), (0, height, 0), (0, 0, depth))
    places = [(z * height + y) * width + x for x, y, z in lines]
    return torch.tensor(places)


def _fill(at: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Walk the box spanned by a (the way to go), b and c from corner `at`; each vector lies along one axis."""
    long, mid, low = (abs(sum(v)) for v in (a, b, c))
    for side, others in ((a, (mid, low)), (b, (long, low)), (c, (long, mid))):
        if others == (1, 1):
            step = _sign(side)
            yield from (_add(at, step, times=i) for i in range(abs(sum(side))))
            return
    half_a, half_b, half_c = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = (_add(v, h, times=-1) for v, h in ((a, half_a), (b, half_b), (c, half_c)))
    end_a = _add(a, _sign(a), times=-1)  # the step to the far side of the box along a
    if 2 * long > 3 * mid and 2 * long > 3 * low:
        yield from _fill(at, half_a, b, c)
        yield from _fill(_add(at, half_a), rest_a, b, c)
    elif 3 * mid > 4 * low:
        near_b = _add(half_b, _sign(b), times=-1)
        yield from _fill(at, half_b, c, half_a)
        yield from _fill(_add(at, half_b), a, rest_b, c)
        yield from _fill(_add(at, end_a, near_b), _minus(half_b), c, _minus(rest_a))
    elif 3 * low > 4 * mid:
        near_c = _add(half_c, _sign(c), times=-1)
        yield from _fill(at, half_c, half_a, b)
        yield from _fill(_add(at, half_c), a, b, rest_c)
        yield from _fill(_add(at, end_a, near_c), _minus(half_c), _minus(rest_a), b)
    else:
        near_b = _add(half_b, _sign(b), times=-1)
        end_c = _add(c, _sign(c), times=-1)
        yield from _fill(at, half_b, half_c, half_a)
        yield from _fill(_add(at, half_b), c, half_a, rest_b)
        yield from _fill(_add(at, near_b, end_c), a, _minus(half_b), _minus(rest_c))
        yield from _fill(_add(at, end_a, half_b, end_c), _minus(c), _minus(rest_a), rest_b)
        yield from _fill(_add(at, end_a, near_b), _minus(half_b), half_c, _minus(rest_a))


def _add(at: Vector, *others: Vector, times: int = 1) -> Vector:
    x, y, z = at
    for u, v, w in others:
        x, y, z = x + times * u, y + times * v, z + times * w
    return x, y, z


def _minus(v: Vector) -> Vector:
    return -v[0], -v[1], -v[2]


def _sign(v: Vector) -> Vector:
    return (v[0] > 0) - (v[0] < 0), (v[1] > 0) - (v[1] < 0), (v[2] > 0) - (v[2] < 0)


def _half(v: Vector) -> Vector:
    """Half of a side, rounded down, made even where the side is longer than 2."""
    half = (v[0] // 2, v[1] // 2, v[2] // 2)
    odd = abs(sum(half)) % 2 == 1 and abs(sum(v)) > 2
    return _add(half, _sign(v)) if odd else half


@lru_cache(maxsize=32)
@ordinary()
def hilbert(shape: tuple[int, ...]) -> Tensor:
    """Raster indices along the Hilbert curve of a square or cube whose side is a power of two, int64 [tokens]."""
    side = shape[0]
    if set(shape) != {side} or side & (side - 1) or len(shape) not in (2, 3):
        raise ValueError(
            f"hilbert: shape={shape} must be a square or cube with a power-of-two side; gilbert fills any box."
        )
    bits, rank = side.bit_length() - 1, len(shape)
    place = torch.arange(prod(shape))
    # Skilling's inverse transform: spread the bits of the place over the axes, undo the Gray code, then the turns.
    spread = [torch.zeros_like(place) for _ in range(rank)]
    for bit in range(bits):
        for axis in range(rank):
            spread[axis] |= (place >> (bit * rank + rank - 1 - axis) & 1) << bit
    last = spread[-1] >> 1
    for axis in range(rank - 1, 0, -1):
        spread[axis] = spread[axis] ^ spread[axis - 1]
    spread[0] = spread[0] ^ last
    for bit in range(1, bits):
        low = (1 << bit) - 1
        for axis in range(rank - 1, -1, -1):
            turned = (spread[axis] >> bit & 1).bool()
            swap = (spread[0] ^ spread[axis]) & low
            first = torch.where(turned, spread[0] ^ low, spread[0] ^ swap)
            spread[axis] = torch.where(turned, spread[axis], spread[axis] ^ swap) if axis else first
            spread[0] = first
    raster = torch.zeros_like(place)
    for axis in spread:
        raster = raster * side + axis
    return raster


def snake(shape: Sequence[int]) -> Tensor:
    """Raster indices to and fro (boustrophedon): every other row, and every other plane, runs backwards."""
    path = torch.zeros(1, dtype=torch.long)
    for size, length in zip(_inner(shape), reversed(shape), strict=True):
        rows = [(path if i % 2 == 0 else path.flip(0)) + i * size for i in range(length)]
        path = torch.cat(rows)
    return path


def _inner(shape: Sequence[int]) -> list[int]:
    """Tokens of everything behind each axis, last axis first."""
    return [prod(tuple(shape)[len(shape) - i :]) for i in range(len(shape))]


def axes(shape: Sequence[int], permutation: Sequence[int]) -> Tensor:
    """Raster indices when the grid is read with its axes in another order, slowest first."""
    if sorted(permutation) != list(range(len(shape))):
        raise ValueError(
            f"axes: permutation={tuple(permutation)} must name each of the axes 0 to {len(shape) - 1} once."
        )
    return torch.arange(prod(shape)).reshape(tuple(shape)).permute(*permutation).flatten()
