"""Bit masks as Hopper's accumulators need them: one word holds the columns that one lane owns of one row.

In an accumulator [64, columns] of wgmma, lane c of four owns columns 8 i + 2 c and 8 i + 2 c + 1 for every i. Its word
holds them in rising order: bit 2 i + j is column 8 i + 2 c + j. Words of up to 128 columns: int32 [masks, rows, 4].
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from glocal.kernels.gluon import layouts
from glocal.plan.blockplan import pack, unpack

# Words by mask table, and by whether rows and columns are exchanged, with the version of the table.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def owned(seen: Tensor) -> Tensor:
    """Bool [M, rows, columns], columns 64 or 128, to words int32 [M, rows, 4]."""
    m, rows, columns = seen.shape
    by_lane = seen.reshape(m, rows, columns // 8, 4, 2).transpose(2, 3)  # [M, rows, 4, columns / 8, 2]
    return pack(by_lane.reshape(m, rows * 4, columns // 4)).reshape(m, rows, 4)


def by_query(masks: Tensor, kv_block: int) -> Tensor:
    """Words int32 [M + 1, q_block, 4] of a mask table int32 [M, q_block, words]; row M lets everything pass. Cached."""
    return _cached(masks, kv_block, turned=False)


def by_key(masks: Tensor, kv_block: int) -> Tensor:
    """The same with rows and columns exchanged, int32 [M + 1, kv_block, 4]: rows are keys. Cached."""
    return _cached(masks, kv_block, turned=True)


def _cached(masks: Tensor, kv_block: int, *, turned: bool) -> Tensor:
    version = (masks.data_ptr(), 0 if masks.is_inference() else masks._version, kv_block)
    known = _KNOWN.get(masks)
    if known is None:
        known = _KNOWN[masks] = {}
    if known.get(turned, (None, None))[0] != version:
        seen = torch.nn.functional.pad(unpack(masks, kv_block), (0, 0, 0, 0, 0, 1), value=True)  # [M + 1, q, k]
        known[turned] = (version, owned(seen.mT if turned else seen))
    return known[turned][1]


@gluon.jit
def load_words(table, mask, first, rows: gl.constexpr, columns: gl.constexpr):
    """Words [64, 4] of rows first .. first + 63 of mask number `mask`, each of `rows` rows."""
    kind: gl.constexpr = layouts.words(columns)
    row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, kind))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, kind))
    start = table + mask.to(gl.int64) * (rows * 4)
    return gl.load(start + gl.expand_dims(row, 1) * 4 + gl.expand_dims(lane, 0))


@gluon.jit
def hidden(s, word, columns: gl.constexpr):
    """s [64, columns] in registers of a product, with -inf where the words [64, 4] have no bit."""
    quads: gl.constexpr = layouts.quads(columns)
    bits = gl.expand_dims(gl.expand_dims(word, 1), 3)  # [64, 1, 4, 1]
    pair = gl.arange(0, columns // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, quads))))
    side = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, quads))))
    pair = gl.expand_dims(gl.expand_dims(gl.expand_dims(pair, 0), 2), 3)
    side = gl.expand_dims(gl.expand_dims(gl.expand_dims(side, 0), 1), 2)
    place = gl.full([1, 1, 1, 1], 1, gl.int32, layout=quads) << (pair * 2 + side)
    seen = (bits & place) != 0  # [64, columns / 8, 4, 2]
    seen = gl.convert_layout(gl.reshape(seen, [64, columns]), layouts.products(columns), assert_trivial=True)
    return gl.where(seen, s, float("-inf"))
