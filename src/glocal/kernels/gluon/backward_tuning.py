"""Launch numbers of the backward kernels on Hopper, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

GROUP = 64  # rows of one warp group of four warps


@dataclass(frozen=True)
class Tuning:
    """tile: queries (gradients of keys) or keys (of queries) of one step; stages: steps in flight.

    registers: limit a thread at the start, so that two programs fit a multiprocessor; None where one fills it.
    buffers: of keys, 2 where programs that have one read those of the next block ahead.
    """

    tile: int
    stages: int
    registers: int | None = None
    buffers: int = 1


# (key block, padded head size)
_KV = {
    (128, 128): Tuning(64, 3),
    (128, 64): Tuning(128, 2, buffers=2),
    (64, 128): Tuning(64, 2, 128),
    (64, 64): Tuning(64, 3, 128),
}
# (query block, padded head size)
_Q = {
    (128, 128): Tuning(128, 2),
    (128, 64): Tuning(128, 3),
    (64, 128): Tuning(64, 2, 128),
    (64, 64): Tuning(64, 3, 128),
}


def tuning_kv(q_block: int, kv_block: int, width: int) -> Tuning:
    """Of gradients of keys and values."""
    found = _KV[kv_block, width]
    return found if found.tile <= q_block else replace(found, tile=q_block)


def tuning_q(q_block: int, kv_block: int, width: int) -> Tuning:
    """Of gradients of queries."""
    found = _Q[q_block, width]
    return found if found.tile <= kv_block else Tuning(kv_block, 2 * found.stages, found.registers)


def whole(kv_block: int) -> bool:
    """Whether one pass makes all gradients: every step of it adds to memory, which only long steps pay for."""
    return kv_block == 2 * GROUP
