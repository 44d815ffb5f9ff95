"""The mask table as the kernels read it: one 32-bit word holds the columns that one thread owns of an accumulator row.

A thread of a matrix unit owns columns 2 c, 2 c + 1 of every group of eight, so of 128 columns the word c of a row
holds bits ``2 (column // 8) + column % 2`` for ``column % 8 // 2 == c``: four words, read once, no shifts by lane.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from glocal.plan.blockplan import unpack
from glocal.plan.facts import capturing

_MADE: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fragments(masks: Tensor, kv_block: int, *, turned: bool) -> Tensor:
    """Bits int32 [M, q_block, words] to int32 [M, rows, ceil(columns / 128) * 4]; turned: rows are keys.

    Made once for each table unless it changes; always anew while a CUDA graph is captured.
    """
    version = (masks.data_ptr(), 0 if masks.is_inference() else masks._version)
    if capturing(masks):
        return _words(unpack(masks, kv_block), turned)
    known = _MADE.get(masks)
    if known is None or known[0] != version:
        known = (version, {})
        _MADE[masks] = known
    made = known[1]
    if (kv_block, turned) not in made:
        made[kv_block, turned] = _words(unpack(masks, kv_block), turned)
    return made[kv_block, turned]


def _words(seen: Tensor, turned: bool) -> Tensor:
    seen = seen.transpose(1, 2) if turned else seen
    m, rows, columns = seen.shape
    parts = pad(seen, (0, -columns % 128)).reshape(
        m, rows, -(-columns // 128), 16, 4, 2
    )  # [M, rows, groups, octets, c, pair]
    bits = parts.movedim(4, 3).flatten(-2).long() << torch.arange(32, device=seen.device)
    total = bits.sum(-1).flatten(2)  # [M, rows, groups * 4]
    return torch.where(total >= 2**31, total - 2**32, total).int()
