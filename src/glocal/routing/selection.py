"""What a router decided: for every group of queries, the groups of keys it sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glocal.canvas import Layout


@dataclass(frozen=True, eq=False)
class Selection:
    """Key groups of each query group, for every sample and head.

    layout: the geometry of the tokens.
    q_groups, kv_groups: int32 [batch|1, heads|1, groups, most] token indices of each group, -1 pads.
    index: int32 [batch|1, heads|1, query groups, most] key groups; the first `count` entries of a row count.
        A group listed m times counts m times.
    count: int32 [batch|1, heads|1, query groups].
    """

    layout: Layout
    q_groups: Tensor
    kv_groups: Tensor
    index: Tensor
    count: Tensor
