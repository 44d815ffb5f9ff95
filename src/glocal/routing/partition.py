"""Partitions: which tokens form which group. Routers score groups, plans turn groups into blocks.

Blocks and boxes (any block-sparse router), regions by count (BiFormer, arXiv 2303.08810), ragged chunks (DHSA,
arXiv 2510.24606), frames (HeSS, arXiv 2603.25336) and clusters are all one gather list.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.canvas import Canvas, Order, raster, tile
from glocal.patterns.blocks import digest

_KEPT = 64
_BLOCKS: OrderedDict[Hashable, Partition] = OrderedDict()
_MOVED: WeakKeyDictionary[Partition, dict[torch.device, Partition]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Partition:
    """Groups of the tokens of one side.

    members: int32 [batch|1, heads|1, groups, most] token indices, -1 pads (anywhere). A token may lie in several
        groups or in none; what lies in none is never seen and sees nothing.
    name: what cut the tokens. shape: groups along each axis where the groups form a grid, else None.
    order, canvas: the order whose blocks the groups are and its canvas, where there is one; planning is faster with it.
    fixed: the groups follow from a canvas, not from data, so what is found out about them once is kept.
    """

    members: Tensor
    name: str
    shape: tuple[int, ...] | None = None
    order: Order | None = None
    canvas: Canvas | None = None
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.members.dim() != 4:
            raise ValueError(
                f"Partition {self.name!r}: members of shape {tuple(self.members.shape)} must be "
                "[batch|1, heads|1, groups, most]."
            )

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.members.shape[2]

    @property
    def most(self) -> int:
        """Tokens of the largest group (pads included)."""
        return self.members.shape[3]

    @property
    def shared(self) -> bool:
        """Whether all samples and heads have the same groups."""
        return self.members.shape[:2] == (1, 1)

    @property
    def counts(self) -> Tensor:
        """Tokens of each group, int32 [batch|1, heads|1, groups]."""
        return (self.members >= 0).sum(-1, dtype=torch.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of the members (one copy to the CPU)."""
        return digest(self.members)

    def to(self, device: torch.device | str) -> Partition:
        """The same groups on another device."""
        device = torch.device(device)
        if self.members.device == device or (device.index is None and self.members.device.type == device.type):
            return self
        moved = _MOVED.setdefault(self, {})
        if device not in moved:
            moved[device] = replace(self, members=self.members.to(device))
        return moved[device]

    def without(self, hidden: Tensor) -> Partition:
        """The same groups less the tokens marked in `hidden`, bool [batch|1, N]: padding that must not be scored."""
        here = self.members.expand(max(self.members.shape[0], hidden.shape[0]), -1, -1, -1)
        table = hidden[:, None, :].expand(here.shape[0], here.shape[1], -1)  # [B, H, N]
        gone = table.gather(2, here.clamp(min=0).flatten(2).long()).unflatten(2, here.shape[2:])
        return replace(self, members=torch.where(gone, -1, here), order=None, canvas=None, fixed=False)

    def some(self, numbers: Tensor) -> Partition:
        """Some of the groups; they are no grid any more, and no order's blocks."""
        members = self.members[:, :, numbers.to(self.members.device)]
        return replace(self, members=members, shape=None, order=None, canvas=None, fixed=False)

    def gather(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The tokens of each group, [B, H, groups, most, D] of x [B, H, N, D]; pads hold `fill`."""
        members = self.members.to(x.device)
        index = members.clamp(min=0).long()
        if self.shared:
            rows = x[:, :, index[0, 0]]  # [B, H, groups, most, D]
        else:
            b, h, _, width = x.shape
            flat = index.expand(b, h, -1, -1).flatten(2)[..., None]  # [B, H, groups * most, 1]
            rows = x.gather(2, flat.expand(-1, -1, -1, width)).unflatten(2, index.shape[2:])
        return torch.where((members >= 0)[..., None], rows, fill)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of each group over its true count, [B, H, groups, D], float32 (float64 for float64); 0 if empty."""
        high = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = self.gather(x.to(high)).sum(-2)
        return total / self.counts.to(x.device).clamp(min=1)[..., None]

    def holding(self, tokens: Tensor) -> Tensor:
        """Which groups hold at least one of `tokens` (indices, any shape), bool [batch|1, heads|1, groups]."""
        return torch.isin(self.members, tokens.to(self.members)).any(-1)

    def __repr__(self) -> str:
        return f"Partition({self.name}: {self.groups} groups of at most {self.most} tokens)"

    @staticmethod
    def blocks(tokens: Canvas | int, block: int | Sequence[int] | Order) -> Partition:
        """Consecutive tokens, boxes of a grid, or the blocks of an order.

        tokens: the canvas, or a number of tokens. block: tokens a block; or a box such as (4, 8, 8), one entry for
        each axis of the canvas's grid (other parts are cut into runs of as many tokens); or an `Order` with a block.
        """
        canvas = Canvas((tokens,)) if isinstance(tokens, int) else tokens
        if isinstance(block, Order):
            return Partition._of_order(canvas, block)
        if isinstance(block, int) and block < 1:
            raise ValueError(f"Partition.blocks: block={block} must be at least 1.")
        key = (canvas, block if isinstance(block, int) else tuple(block))
        if key not in _BLOCKS:  # a router asks for the same blocks at every step
            order = raster(canvas, block) if isinstance(block, int) else tile(canvas, block)
            _BLOCKS[key] = Partition._of_order(canvas, order)
            if len(_BLOCKS) > _KEPT:
                _BLOCKS.popitem(last=False)
        return _BLOCKS[key]

    @staticmethod
    def _of_order(canvas: Canvas, order: Order) -> Partition:
        gather = order.gather.reshape((1,) * (3 - order.gather.dim()) + order.gather.shape)
        gather = pad(gather, (0, -gather.shape[-1] % order.block), value=-1)
        members = gather.unflatten(-1, (-1, order.block)).int()
        shape = None
        if len(order.regions) == 1 and set(order.regions[0].dilation) == {1}:
            shape = order.regions[0].tiles
        return Partition(members, f"blocks {order.name}", shape, order, canvas, fixed=True)

    @staticmethod
    def regions(
        canvas: Canvas, count: int | Sequence[int], *, part: str | None = None, rounding: Literal["up", "down"] = "up"
    ) -> Partition:
        """A grid cut into `count` regions along each axis (BiFormer, arXiv 2303.08810), groups row-major.

        rounding: an axis of L tokens that `count` does not divide has regions of ceil(L / count) tokens, the last ones
        short or empty ("up"); or of floor(L / count) tokens, and then ceil(L / floor(L / count)) of them ("down").
        """
        grid = canvas.grid if part is None else canvas.parts[canvas.number(part)]
        axes = grid.axes
        counts = (count,) * len(axes) if isinstance(count, int) else tuple(count)
        if len(counts) != len(axes) or min(counts) < 1:
            raise ValueError(
                f"Partition.regions: count={count} needs {len(axes)} positive entries for the grid {axes}."
            )
        if rounding not in ("up", "down"):
            raise ValueError(f"Partition.regions: rounding={rounding!r}; legal: 'up', 'down'.")
        short = [axis for axis, (n, c) in enumerate(zip(axes, counts, strict=True)) if n < c]
        if short and rounding == "down":
            raise ValueError(
                f"Partition.regions: count={counts} asks for more regions than tokens on axis {short[0]} of {axes}; "
                f"largest there: {axes[short[0]]}."
            )
        size = [-(-n // c) if rounding == "up" else n // c for n, c in zip(axes, counts, strict=True)]
        number = counts if rounding == "up" else tuple(-(-n // s) for n, s in zip(axes, size, strict=True))
        index = canvas.indices(grid.name).reshape(axes)
        for axis, (s, c) in enumerate(zip(size, number, strict=True)):
            index = pad(index.movedim(axis, -1), (0, s * c - index.shape[axis]), value=-1).movedim(-1, axis)
        index = index.reshape([n for pair in zip(number, size, strict=True) for n in pair])
        rank = len(axes)
        index = index.permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
        members = index.reshape(index.shape[:rank].numel(), -1).int()
        words = "x".join(map(str, number))
        return Partition(members[None, None], f"regions {words}", number, fixed=True)

    @staticmethod
    def chunks(bounds: Tensor, most: int | None = None) -> Partition:
        """Ragged runs: chunk g of a sample holds tokens bounds[g] .. bounds[g + 1] - 1.

        bounds: int [groups + 1] or [batch|1, groups + 1], not decreasing; equal bounds make an empty chunk.
        most: tokens of the longest chunk; None looks (a wait for the device).
        """
        bounds = bounds.reshape(-1, bounds.shape[-1]).long()
        length = bounds.diff(dim=-1)  # [B, groups]
        longest = int(length.max()) if most is None else most
        if most is None and bool((length < 0).any()):
            raise ValueError(f"Partition.chunks: bounds={bounds.tolist()} must not decrease.")
        place = torch.arange(longest, device=bounds.device)
        members = torch.where(place < length[..., None], bounds[:, :-1, None] + place, -1)
        return Partition(members[:, None].int(), "chunks")

    @staticmethod
    def frames(canvas: Canvas, part: str | None = None) -> Partition:
        """One group a frame, with everything that repeats with it; each part that does not repeat is one more group.

        Without repeated parts, the leading axis of the only grid (or of `part`) counts frames. Frames come first.
        """
        repeated = [p for p in canvas.parts if p.times > 1]
        chosen = canvas.parts[canvas.number(part)] if part is not None else (repeated[0] if repeated else canvas.grid)
        frames = chosen.axes[0]
        pieces, others = [], []
        for number, tokens, index in canvas.runs():
            mine = canvas.parts[number]
            if mine is chosen or (chosen.times > 1 and mine.times == chosen.times):
                pieces.append(index.reshape(frames, tokens // frames))
            else:
                others.append(index)
        inside = torch.cat(pieces, 1).sort(-1).values  # [frames, tokens a frame], in the order of the sequence
        rows = [*inside, *others]
        most = max(row.numel() for row in rows)
        members = torch.stack([pad(row, (0, most - row.numel()), value=-1) for row in rows]).int()
        return Partition(members[None, None], f"frames of {chosen.name}", None if others else (frames,), fixed=True)

    @staticmethod
    def clusters(labels: Tensor, groups: int, most: int | None = None) -> Partition:
        """Tokens by label; inside a group they keep their order.

        labels: int [N], [batch|1, N] or [batch|1, heads|1, N] in 0..groups-1; -1 belongs to no group.
        most: slots of a group; None is the largest group. That is looked up in any case (a wait for the device): tokens
        beyond `most` would be lost, so one that is too small raises ValueError.
        """
        labels = (labels[None] if labels.dim() == 1 else labels).long()
        labels = labels[:, None] if labels.dim() == 2 else labels  # [B, H, N]
        slot = torch.where(labels < 0, groups, labels)
        size = torch.zeros(*labels.shape[:2], groups + 1, dtype=torch.long, device=labels.device)
        size.scatter_add_(2, slot, torch.ones_like(slot))
        longest = int(size[..., :groups].max())
        if most is not None and most < longest:
            raise ValueError(f"Partition.clusters: most={most}, but the largest cluster has {longest} tokens.")
        width = longest if most is None else most
        order = slot.argsort(dim=-1, stable=True)  # tokens by label
        label = slot.gather(-1, order)
        first = size.cumsum(-1) - size  # [B, H, groups + 1]
        place = torch.arange(slot.shape[-1], device=slot.device) - first.gather(-1, label)
        members = torch.full((*labels.shape[:2], groups * width + 1), -1, dtype=torch.long, device=labels.device)
        members.scatter_(2, torch.where(label < groups, label * width + place, groups * width), order)
        return Partition(members[..., :-1].unflatten(-1, (groups, width)).int(), "clusters")
