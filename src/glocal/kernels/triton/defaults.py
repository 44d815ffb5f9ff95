"""Launch numbers by size, as data. They follow from registers and shared memory; no GPU has measured them yet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Warps of a program and stages of its pipelined loop."""

    warps: int
    stages: int


# (largest block side up to, padded head size up to) -> forward, backward; the first row that fits counts.
_TABLE = (
    (32, 128, Tuning(2, 3), Tuning(2, 2)),
    (32, 256, Tuning(4, 2), Tuning(4, 1)),
    (64, 64, Tuning(4, 3), Tuning(4, 2)),
    (64, 128, Tuning(4, 3), Tuning(4, 2)),
    (64, 256, Tuning(8, 2), Tuning(8, 1)),
    (128, 64, Tuning(4, 3), Tuning(8, 2)),
    (128, 128, Tuning(8, 2), Tuning(8, 1)),
    (128, 256, Tuning(8, 1), Tuning(8, 1)),
)

ROWS = 32  # tokens of a program that brings slots back to tokens


def tuning(block: int, width: int, *, backward: bool) -> Tuning:
    """For the larger block side and the larger padded head size."""
    for most_block, most_width, ahead, back in _TABLE:
        if block <= most_block and width <= most_width:
            return back if backward else ahead
    raise ValueError(
        f"backend='triton': block {block} with padded head size {width}; legal: blocks to 128, head sizes to 256."
    )


def padded(size: int) -> int:
    """A head size as the matrix units take it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())
