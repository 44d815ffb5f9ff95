"""The gradient of a relative table from that of the logits: each entry adds up its pairs in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["numbers", "most", "width"])
def entries_kernel(sums, entries, pairs, grad, numbers, most, width, BLOCK: tl.constexpr):
    """sums float32 [H, numbers]; entries [E] that occur; pairs [E, most]: places in a row of sums, -1 pads.

    Adds to grad float32 [H, width].
    """
    entry, head = tl.program_id(0), tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, most, BLOCK):
        slot = at + tl.arange(0, BLOCK)
        pair = tl.load(pairs + entry.to(tl.int64) * most + slot, mask=slot < most, other=-1)
        total += tl.load(sums + head.to(tl.int64) * numbers + pair, mask=pair >= 0, other=0.0)
    place = grad + head * width + tl.load(entries + entry)
    tl.store(place, tl.load(place) + tl.sum(total))
