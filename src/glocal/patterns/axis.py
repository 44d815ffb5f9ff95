"""Which keys one query sees along one axis: the window rule of Generalized Neighborhood Attention (arXiv 2504.16922).

Everything is integer arithmetic inside a dilation group: token i belongs to group ``i % dilation`` and sits at place
``i // dilation`` of the ``ceil((length - group) / dilation)`` places of that group. A window never crosses groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Border = Literal["shift", "clip"]
Oversize = Literal["error", "full"]


@dataclass(frozen=True)
class AxisWindow:
    """Window of one axis: `window` keys, shared by `stride` neighbouring queries, every `dilation`-th token.

    border: "shift" moves a window inwards at the border (every query sees `window` keys), "clip" cuts it off.
    causal: nobody sees a later key; the last query of a stride group leads it.
    """

    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    border: Border = "shift"

    @property
    def left(self) -> int:
        """Keys before the leader: an even window has one more on the left."""
        return self.window // 2

    @property
    def right(self) -> int:
        """Keys after the leader."""
        return self.window // 2 + self.window % 2 - 1

    def span(self, place: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        """First visible place and one past the last, for queries at `place` in groups of `length` places.

        Both results are monotone in `place`; shapes broadcast.
        """
        last = torch.as_tensor(length, device=place.device) - 1
        if self.causal:
            leader = torch.minimum((place // self.stride) * self.stride + self.stride - 1, last)
            start = (leader - self.left - self.right).clamp(min=0)
            return start, torch.minimum(place + 1, last + 1)
        leader = torch.minimum((place // self.stride) * self.stride + self.stride // 2, last)
        start, end = leader - self.left, leader + self.right + 1
        if self.border == "clip":
            return start.clamp(min=0), torch.minimum(end, last + 1)
        start = start.clamp(min=0) + torch.where(end > last + 1, last + 1 - end, 0)
        start = start.clamp(min=0)
        return start, torch.minimum(start + self.window, last + 1)

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        """Whether the query at coordinate `q` sees the key at coordinate `k` (broadcast bool)."""
        group = q % self.dilation
        places = -((group - length) // self.dilation)  # ceil((length - group) / dilation)
        start, end = self.span(q // self.dilation, places)
        place = k // self.dilation
        return (k % self.dilation == group) & (place >= start) & (place < end)
