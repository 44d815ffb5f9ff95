"""Tiles and launch numbers by size, as data: what `bench/triton_tiles.py` found fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["forward", "backward_q", "backward_kv"]


@dataclass(frozen=True)
class Tuning:
    """queries, keys: most tokens of a tile; warps of a program; stages of its pipelined loop."""

    queries: int
    keys: int
    warps: int
    stages: int


# Padded head size up to -> tiles of a plan without partial blocks, and with, for 16-bit numbers. Sizes to 128 are
# measured; the last rows follow from registers and shared memory alone.
TABLE: dict[Part, list[tuple[int, Tuning, Tuning]]] = {
    "forward": [
        (64, Tuning(64, 128, 4, 2), Tuning(64, 128, 4, 2)),
        (128, Tuning(128, 64, 4, 3), Tuning(128, 128, 8, 3)),
        (256, Tuning(64, 64, 4, 2), Tuning(64, 64, 4, 2)),
    ],
    "backward_q": [
        (64, Tuning(64, 64, 4, 2), Tuning(64, 64, 4, 2)),
        (128, Tuning(64, 64, 4, 2), Tuning(64, 32, 4, 3)),
        (256, Tuning(64, 32, 4, 2), Tuning(64, 32, 4, 2)),
    ],
    "backward_kv": [
        (64, Tuning(64, 64, 4, 2), Tuning(128, 64, 4, 2)),
        (128, Tuning(64, 64, 4, 2), Tuning(64, 64, 4, 2)),
        (256, Tuning(32, 64, 8, 1), Tuning(32, 64, 8, 1)),
    ],
}
FLOAT32 = {64: Tuning(64, 32, 4, 2), 128: Tuning(32, 32, 4, 2), 256: Tuning(16, 16, 4, 1)}
FLOAT32_PRECISION = "tf32x3"  # three products of 10-bit mantissas: as exact as float32, at the rate of matrix units
ROWS = 32  # tokens of a program that moves rows


def tuning(part: Part, width: int, itemsize: int, blocks: tuple[int, int], *, masked: bool) -> Tuning:
    """For the larger padded head size; tiles are powers of two that divide the query and key block."""
    table = [(w, t, t) for w, t in FLOAT32.items()] if itemsize == 4 else TABLE[part]
    for most, whole, partial in table:
        if width <= most:
            found = partial if masked else whole
            queries, keys = (_part(b, most_) for b, most_ in zip(blocks, (found.queries, found.keys), strict=True))
            warps = min(found.warps, max(1, queries * keys // 512)) if part != "backward_kv" else found.warps
            return Tuning(queries, keys, warps if warps & (warps - 1) == 0 else 4, found.stages)
    raise ValueError(f"backend='triton': padded head size {width}; legal: to 256.")


def _part(block: int, most: int) -> int:
    """The largest power of two up to `most` that divides `block`."""
    return min(block & -block, most)


def padded(size: int) -> int:
    """A head size as the matrix units take it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())
