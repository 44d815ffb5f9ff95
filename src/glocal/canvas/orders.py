"""Orders: in which sequence a canvas hands its tokens to blocks, as gather lists (-1 pads).

`raster` keeps the sequence; `tile` makes every block a box of the grid, so that local windows touch few blocks
(token permutation of Generalized Neighborhood Attention, arXiv 2504.16922). Both pad each part to whole blocks, so
that no block holds tokens of two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal._kept import ordinary
from glocal.canvas.parts import Canvas, Part


@dataclass(frozen=True)
class Region:
    """Consecutive blocks of an order that are boxes of one part.

    first: number of the first block. Blocks run over dilation groups, then tiles (both row-major); inside a block the
    tokens of the box (row-major unless the order says otherwise) are followed by padding if the block is larger. A box
    has `tile` tokens per axis, `dilation` apart.
    """

    part: int
    first: int
    tile: tuple[int, ...]
    dilation: tuple[int, ...]
    tiles: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return prod(self.tiles) * prod(self.dilation)

    def axis(self, axis: int, length: int) -> Tensor:
        """Coordinates along `axis` of every slot (dilation group x tile), int64 [slots, tile], -1 pads."""
        d, t, n = self.dilation[axis], self.tile[axis], self.tiles[axis]
        group = torch.arange(d)[:, None, None]  # [d, 1, 1]
        place = (torch.arange(n)[:, None] * t + torch.arange(t))[None]  # [1, n, t]
        where = (place * d + group).reshape(d * n, t)
        return where.masked_fill(where >= length, -1)


@dataclass(frozen=True, eq=False)
class Order:
    """A gather list over the tokens of a canvas.

    name: identifies the order among those of the same canvas (plans are cached by it).
    gather: int64 [N'] or [heads|1, N'] or [batch|1, heads|1, N'] linear indices, -1 pads; repeats are legal.
    regions: where blocks of `block` tokens are boxes; empty if the order is only data.
    """

    name: str
    gather: Tensor
    block: int = 1
    regions: tuple[Region, ...] = ()

    def inverse(self, size: int) -> Tensor:
        """Where each of `size` tokens lies in the order, int64 [..., size]; ValueError if one is missing or twice."""
        where = torch.full((*self.gather.shape[:-1], size + 1), -1, dtype=torch.long, device=self.gather.device)
        slot = torch.where(self.gather < 0, size, self.gather)
        counts = torch.zeros_like(where).scatter_add_(-1, slot, torch.ones_like(slot))[..., :size]
        if bool((counts != 1).any()):
            raise ValueError(
                f"Order {self.name!r} is not one-to-one: {int((counts == 0).sum())} tokens are missing and "
                f"{int((counts > 1).sum())} repeat; rows can only return through a one-to-one order."
            )
        where.scatter_(-1, slot, torch.arange(self.gather.shape[-1], device=slot.device).expand_as(slot).contiguous())
        return where[..., :size]


def raster(canvas: Canvas, block: int = 1) -> Order:
    """The tokens as they lie, each part padded at its end to a multiple of `block`.

    With several interleaved (repeated) parts the sequence is kept whole and padded once.
    """
    return _raster(canvas, int(block))


@lru_cache(maxsize=256)
@ordinary()
def _raster(canvas: Canvas, block: int) -> Order:
    if any(p.times > 1 for p in canvas.parts):
        gather = pad(torch.arange(canvas.size), (0, -canvas.size % block), value=-1)
        return Order(f"raster/{block}", gather, block)
    pieces, regions, first = [], [], 0
    for number, tokens, index in canvas.runs():
        pieces.append(pad(index, (0, -tokens % block), value=-1))
        blocks = pieces[-1].numel() // block
        if len(canvas.parts[number].axes) == 1:
            regions.append(Region(number, first, (block,), (1,), (blocks,)))
        first += blocks
    if len(regions) < len(canvas.parts):
        regions = []
    return Order(f"raster/{block}", torch.cat(pieces), block, tuple(regions))


def tile(
    canvas: Canvas,
    shape: Sequence[int],
    dilation: Sequence[int] | int = 1,
    *,
    part: str | None = None,
    block: int | None = None,
    slowest: int = 0,
) -> Order:
    """One grid cut into boxes of `shape` tokens (`dilation` apart per axis); other parts in raster blocks of that size.

    Every axis is padded at its end to a multiple of tile x dilation. block: slots of a block if more than the box
    holds; the rest of each block is padding. slowest: the axis that runs slowest inside a box, before the others in
    their order; the halves of a block are the halves of its box along that axis. Raises ValueError if the rank differs
    or a box does not fit its block.
    """
    grid = canvas.grid if part is None else canvas.parts[canvas.number(part)]
    shape = tuple(int(n) for n in shape)
    steps = (int(dilation),) * len(grid.axes) if isinstance(dilation, int) else tuple(int(n) for n in dilation)
    for name, value in (("shape", shape), ("dilation", steps)):
        if len(value) != len(grid.axes) or min(value) < 1:
            raise ValueError(
                f"tile: {name}={value} must have {len(grid.axes)} positive entries, one for each axis of {grid.axes}."
            )
    if block is not None and block < prod(shape):
        raise ValueError(f"tile: block={block} does not hold a box of {prod(shape)} tokens (shape={shape}).")
    if not 0 <= slowest < len(shape):
        raise ValueError(f"tile: slowest={slowest} must be an axis of {grid.axes}, from 0 to {len(shape) - 1}.")
    return _tile(canvas, shape, steps, canvas.number(grid.name), prod(shape) if block is None else block, slowest)


@lru_cache(maxsize=256)
@ordinary()
def _tile(
    canvas: Canvas, shape: tuple[int, ...], dilation: tuple[int, ...], number: int, block: int, slowest: int
) -> Order:
    pieces, regions, first = [], [], 0
    for part_number, tokens, index in canvas.runs():
        part = canvas.parts[part_number]
        if part_number == number:
            piece, region = _boxes(part, index, shape, dilation, part_number, first)
            piece = piece.reshape(-1, *shape).movedim(1 + slowest, 1).reshape(-1, prod(shape))
            piece = pad(piece, (0, block - prod(shape)), value=-1).flatten()
        else:
            piece = pad(index, (0, -tokens % block), value=-1)
            region = Region(part_number, first, (block,), (1,), (piece.numel() // block,))
        pieces.append(piece)
        if part_number == number or len(part.axes) == 1:
            regions.append(region)
        first += piece.numel() // block
    if len(regions) < len(canvas.parts):
        regions = []
    name = f"tile{'x'.join(map(str, shape))}/{'x'.join(map(str, dilation))}@{canvas.parts[number].name}"
    name += "" if block == prod(shape) else f"/{block}"
    name += f"/slowest{slowest}" if slowest else ""
    return Order(name, torch.cat(pieces), block, tuple(regions))


def _boxes(
    part: Part, index: Tensor, shape: tuple[int, ...], dilation: tuple[int, ...], number: int, first: int
) -> tuple[Tensor, Region]:
    steps = [t * d for t, d in zip(shape, dilation, strict=True)]
    padded = [-(-n // s) * s for n, s in zip(part.axes, steps, strict=True)]
    grid = index.reshape(part.axes)
    for axis, (length, whole) in enumerate(zip(part.axes, padded, strict=True)):
        grid = pad(grid.movedim(axis, -1), (0, whole - length), value=-1).movedim(-1, axis)
    rest = tuple(n // s for n, s in zip(padded, steps, strict=True))
    split = [size for r, t, d in zip(rest, shape, dilation, strict=True) for size in (r, t, d)]
    rank = len(shape)
    # axes now (rest, tile, dilation) per grid axis -> all dilations, all rests, all tiles
    grid = grid.reshape(split).permute(*range(2, 3 * rank, 3), *range(0, 3 * rank, 3), *range(1, 3 * rank, 3))
    return grid.flatten(), Region(number, first, shape, dilation, rest)


def from_gather(name: str, gather: Tensor) -> Order:
    """An order given as data: `gather` int [N'] or [heads|1, N'] or [batch|1, heads|1, N'] with -1 pads."""
    return Order(name, gather.long())
