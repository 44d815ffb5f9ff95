"""What a router decided: for every group of queries, the groups of keys it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.patterns.base import Pattern
from glocal.routing.partition import Partition


@dataclass(frozen=True, eq=False)
class Selection:
    """Key groups of each query group, for every sample and head.

    layout: the geometry of the tokens.
    q_part, kv_part: the groups. Groups of one token make a selection of tokens.
    index: int32 [batch|1, heads|1, query groups, most] key groups; the first `count` entries of a row count. A group
        listed m times counts m times, and so does a key that lies in m listed groups.
    count: int32 [batch|1, heads|1, query groups].
    within: a pattern that hides pairs inside the listed groups (causal, a neighbourhood); None hides nothing.
    dedupe: a key counts once for a query group, however often it is listed.
    scores: score of each listed group, like `index`; differentiable if the route was asked for it.
    competing: which competing columns won a place in the route, bool [batch|1, heads|1, query groups, columns].
    """

    layout: Layout
    q_part: Partition
    kv_part: Partition
    index: Tensor
    count: Tensor
    within: Pattern | None = None
    dedupe: bool = False
    scores: Tensor | None = None
    competing: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.dim() != 4 or self.index.shape[:3] != self.count.shape:
            raise ValueError(
                f"Selection: index of shape {tuple(self.index.shape)} must be [batch|1, heads|1, query groups, most] "
                f"and count of shape {tuple(self.count.shape)} its first three axes."
            )
        if self.index.shape[2] != self.q_part.groups:
            raise ValueError(
                f"Selection: index has {self.index.shape[2]} query groups, but {self.q_part!r} has "
                f"{self.q_part.groups}."
            )
        heads = {t.shape[1] for t in (self.index, self.q_part.members, self.kv_part.members)} - {1}
        batch = {t.shape[0] for t in (self.index, self.q_part.members, self.kv_part.members)} - {1}
        for name, sizes in (("heads", heads), ("samples", batch)):
            if len(sizes) > 1:
                raise ValueError(f"Selection: lists and groups disagree about the number of {name}: {sorted(sizes)}.")

    @property
    def q_groups(self) -> Tensor:
        """Token indices of each query group, int32 [batch|1, heads|1, groups, most], -1 pads."""
        return self.q_part.members

    @property
    def kv_groups(self) -> Tensor:
        """Token indices of each key group."""
        return self.kv_part.members

    def multiplicity(self) -> Tensor:
        """How often each query group lists each key group, int32 [batch|1, heads|1, query groups, key groups]."""
        live = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        times = torch.zeros(*self.count.shape, self.kv_part.groups, dtype=torch.int32, device=self.index.device)
        return times.scatter_add_(-1, self.index.long(), live.int())

    def __repr__(self) -> str:
        lists = "x".join(map(str, self.index.shape[:2]))
        return f"Selection({lists} lists of at most {self.index.shape[-1]} of {self.kv_part!r} for {self.q_part!r})"


def from_mask(
    layout: Canvas | Layout,
    q_part: Partition,
    kv_part: Partition,
    mask: Tensor,
    within: Pattern | None = None,
    *,
    most: int | None = None,
) -> Selection:
    """The selection that a group mask (or how often each group counts) describes.

    mask: bool or int [query groups, key groups], [heads|1, ...] or [batch|1, heads|1, ...]; the shards of S2-Attention
        (arXiv 2407.17678) are such a mask.
    most: width of the lists. None: the longest list, or on CUDA the number of key groups for a bool mask, since looking
        would wait for the device. A longer list raises an error (on CUDA when it is noticed).
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"from_mask: mask is a {type(mask).__name__}; legal: a bool or int tensor, behind the parts.")
    layout = Layout.of(layout)
    times = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).int()
    if times.shape[2:] != (q_part.groups, kv_part.groups):
        raise ValueError(
            f"from_mask: mask of shape {tuple(mask.shape)} must end with {q_part.groups} query groups and "
            f"{kv_part.groups} key groups."
        )
    count = times.sum(-1, dtype=torch.int32)
    free = mask.is_cuda and mask.dtype == torch.bool
    if most is None:
        most = kv_part.groups if free else (int(count.max()) if count.numel() else 0)
    elif mask.is_cuda:
        torch._assert_async((count <= most).all(), f"from_mask: a row lists more than most={most} groups")
    elif count.numel() and int(count.max()) > most:
        raise ValueError(f"from_mask: most={most}, but a row lists {int(count.max())} groups.")
    ends = times.cumsum(-1).contiguous()
    place = torch.arange(most, device=mask.device).expand(*count.shape, most).contiguous()
    index = torch.searchsorted(ends, place, right=True).clamp(max=max(kv_part.groups - 1, 0))
    return Selection(layout, q_part, kv_part, index.int(), count, within)
