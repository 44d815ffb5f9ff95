"""Hidden words at the end of a sequence, cut off before attention: kernels that know nothing of padding then take the
call, and no pair is computed for words that nobody sees. A hidden query gives 0, as everywhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal.canvas import Canvas, Layout

# Per tensor of lengths, by its version: the length that all samples share, or None. One wait for the device a forward.
_SHARED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def without_hidden(layout: Layout) -> Layout | None:
    """`layout` with as many tokens in its last part as are visible; None where there is nothing to cut off, samples
    differ, or the hidden tokens do not lie at the end. Under torch.compile lengths are not known: None.
    """
    plain = layout.q == layout.kv and layout.documents is None and layout.nq == layout.nk == layout.q.size
    last = layout.q.parts[-1]
    if not plain or set(layout.lengths) != {last.name} or last.is_grid or last.times != 1:
        return None
    if torch.compiler.is_compiling():
        return None
    visible = shared_length(layout.lengths[last.name])
    if visible is None or visible >= last.tokens:
        return None
    shorter = (replace(last, shape=visible),) if visible else ()
    canvas = Canvas((*layout.q.parts[:-1], *shorter), arrives=layout.q.arrives)
    policy = {pair: rule for pair, rule in layout.policy.items() if visible or last.name not in pair}
    return replace(layout, q=canvas, kv=canvas, policy=policy, lengths={})


def shared_length(lengths: Tensor) -> int | None:
    """The entry of int [B] that all samples share, or None; looked at once for each tensor."""
    mark = lengths.data_ptr(), 0 if lengths.is_inference() else lengths._version
    known = _SHARED.get(lengths)
    if known is None or known[0] != mark:
        values = set(lengths.tolist())
        known = _SHARED[lengths] = (mark, values.pop() if len(values) == 1 else None)
    return known[1]
