"""Bit masks as Hopper's accumulators need them: one word holds the columns that one lane owns of one row.

In an accumulator [64, columns] of wgmma, lane c of four owns columns 8 i + 2 c and 8 i + 2 c + 1 for every i. Its word
holds them in rising order: bit 2 i + j is column 8 i + 2 c + j. The words are those of `glocal.kernels.triton.masks`.
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
from glocal.kernels.triton.masks import fragments
from glocal.plan.blockplan import pack
from glocal.plan.facts import capturing

# Two instructions an entry; left to themselves, compilers make bits of many comparisons and take them apart again.
SELECT = gl.constexpr(
    "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p; }"
)

# Words and one more row that lets everything pass, by mask table and by whether rows are keys.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def by_query(masks: Tensor, kv_block: int) -> Tensor:
    """Words int32 [M + 1, q_block, 4] of a mask table int32 [M, q_block, words]; row M lets everything pass."""
    return _open(masks, kv_block, turned=False)


def by_key(masks: Tensor, kv_block: int) -> Tensor:
    """The same with rows and columns exchanged, int32 [M + 1, kv_block, 4]: rows are keys."""
    return _open(masks, kv_block, turned=True)


def kept(order: Tensor, kv_block: int) -> Tensor:
    """Words int32 [b, h, key blocks * 4] of the slots of an order [b, h, room] that hold a key."""
    b, h, room = order.shape
    live = (order >= 0).reshape(b * h * (room // kv_block), kv_block // 8, 4, 2).transpose(1, 2)  # [., 4, octets, 2]
    return pack(live.reshape(-1, 4, kv_block // 4)).reshape(b, h, -1)


def _open(masks: Tensor, kv_block: int, *, turned: bool) -> Tensor:
    words = fragments(masks, kv_block, turned=turned)
    known = _KNOWN.get(words)
    if known is None:
        known = torch.nn.functional.pad(words, (0, 0, 0, 0, 0, 1), value=-1)
        if not capturing(words):
            _KNOWN[words] = known
    return known


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
    s = gl.convert_layout(gl.reshape(s, [64, columns // 8, 4, 2]), quads, assert_trivial=True)
    s = gl.inline_asm_elementwise(SELECT, "=f,f,r,r", [s, bits, place], gl.float32, is_pure=True, pack=1)
    return gl.convert_layout(gl.reshape(s, [64, columns]), layouts.products(columns), assert_trivial=True)


@gluon.jit
def pad_words(at, columns: gl.constexpr):
    """The four words at `at`, [1, 4], for `hidden`."""
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, layouts.words(columns)))
    return gl.expand_dims(gl.load(at + lane), 0)
