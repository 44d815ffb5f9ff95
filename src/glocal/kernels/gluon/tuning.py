"""Launch numbers of the Hopper forward kernel by block and head size, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Tuning:
    """keys: tokens of a step: a part of a key block, one, or two of 64. stages: steps in flight.

    queries: query blocks in flight.
    persistent: programs a multiprocessor, each of which takes many query blocks in turn; 0: one a query block.
    registers: of a thread of the second group. most: of a thread before the groups share them out.
    held: queries stay in registers. pinned: all exponentials come before the wait for the values' product.
    joined: the first product of a query block is made beside the last of the one before; each must have a key block.
    """

    keys: int = 128
    stages: int = 2
    queries: int = 1
    persistent: int = 1
    registers: int = 240
    most: int = 168
    held: bool = False
    pinned: bool = False
    joined: bool = False


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for.

    rows: of a query block, 64 or 128. block: keys of a key block. d, dv: padded head sizes. real: columns of the
    result. masked: there are partial blocks. The rest is as in `Tuning`.
    """

    rows: int
    block: int
    keys: int
    d: int
    dv: int
    real: int
    masked: bool
    stages: int
    queries: int
    registers: int
    held: bool
    pinned: bool
    joined: bool

    @staticmethod
    @lru_cache
    def of(blocks: tuple[int, int], dims: tuple[int, int], masked: bool, tuned: Tuning) -> Shape:
        """For (query, key) block sizes and (key, value) head sizes."""
        return Shape(
            rows=blocks[0],
            block=blocks[1],
            keys=min(tuned.keys, 2 * blocks[1]),
            d=padded(dims[0]),
            dv=padded(dims[1]),
            real=dims[1],
            masked=masked,
            stages=tuned.stages,
            queries=tuned.queries,
            registers=tuned.registers,
            held=bool(tuned.held),
            pinned=bool(tuned.pinned),
            joined=bool(tuned.joined),
        )


@lru_cache
def tuning(blocks: tuple[int, int], width: int, every: bool = False) -> Tuning:
    """For (query, key) blocks of 64 or 128 and the larger padded head size, as `bench/kernels_hopper.py` found best.

    every: each query block is known to see a key block.
    """
    if blocks[0] == 64:
        small = Tuning(keys=64, persistent=0, pinned=True)
        if width > 128:
            return replace(small, most=224)
        return replace(small, held=True, most=80 if width <= 64 else 128)
    if width > 128:
        return Tuning(keys=64)
    large = Tuning(keys=blocks[1], stages=3, queries=2) if width <= 64 else Tuning()
    return replace(large, queries=2, joined=True) if every else large


def padded(size: int) -> int:
    """A head size as TMA and the matrix units take it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())
