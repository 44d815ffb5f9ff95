"""Launch numbers of the Hopper forward kernel by block and head size, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """stages: key blocks in flight. ctas: programs a multiprocessor. persistent: each takes many query blocks in turn.

    registers: of a thread of the second group. most: of a thread before the groups share them out.
    emulate: of so many exponentials one is left to the multipliers; 0 for none. held: queries stay in registers.
    pinned: all exponentials come before the wait for the values' product. queries: query blocks in flight.
    """

    stages: int = 2
    ctas: int = 1
    persistent: bool = True
    registers: int = 240
    most: int = 168
    emulate: int = 0
    held: bool = False
    pinned: bool = False
    queries: int = 1


def tuning(q_block: int, kv_block: int, width: int) -> Tuning:
    """For block sizes of 64 or 128 and the larger padded head size."""
    if q_block == 64:
        if width > 128:
            return Tuning(most=240)
        return Tuning(ctas=2, most=128)
    return Tuning(stages=3 if width <= 64 else 2)


def padded(size: int) -> int:
    """A head size as TMA and the matrix units take it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())
