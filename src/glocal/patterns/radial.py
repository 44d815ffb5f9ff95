"""Radial Attention (arXiv 2506.19852): between two frames, the band of positions that see each other halves each time
the frame distance doubles; beyond that, only every so many-th frame is kept.

`RadialTokens` is the mask of the paper. `RadialBlocks` is what the published models run: wider bands, thinning
counted in units of 128 tokens, and a pooling rule that decides for whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from glocal._kept import ordinary
from glocal.canvas import Coords, Layout
from glocal.patterns.base import Everything, Term
from glocal.patterns.blocks import BlockPattern
from glocal.patterns.relations import Keys, Products, raster_band

_UNIT = 128  # thinning is counted in these units whatever the block size


@dataclass(frozen=True)
class FrameGap:
    """Frames at a distance between `low` and `high` that is a multiple of `step`."""

    low: int
    high: int
    step: int = 1

    def sees(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        """Whether the two frames are kept (broadcast bool)."""
        gap = (q - k).abs()
        return (gap >= self.low) & (gap <= self.high) & (gap % self.step == 0)


@dataclass(frozen=True)
class RadialTokens(Products):
    """The paper's mask on a grid whose first axis is time; the other axes count as raster positions of a frame.

    With gap = |i - j| frames, p the largest power of two up to max(gap, 1) and s tokens a frame: positions k, l see
    each other if |k - l| + 1 <= s / p, or if k = l and gap is a multiple of ceil(p / s).
    sink: everybody also sees the first frame.
    """

    sink: bool = True

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        s = prod(shape[1:])
        reach = []  # largest |k - l| for every gap; -1 where frames do not see each other
        for gap in range(shape[0]):
            p = 1 << max(gap.bit_length() - 1, 0)
            reach.append(s // p - 1 if p <= s else -1 if gap % -(-p // s) else 0)
        place = [_raster(c.axes[1:], shape[1:]) for c in (q, k)]
        gaps = (q.axes[0] - k.axes[0]).abs().clamp(max=shape[0] - 1)  # text may lie beyond the frames
        seen = (place[0] - place[1]).abs() <= torch.tensor(reach, device=gaps.device)[gaps]
        return seen | (k.axes[0] == 0) if self.sink else seen

    def terms(self, shape: tuple[int, ...], head: int | None) -> Sequence[Term]:
        if len(shape) < 2:
            raise ValueError(
                f"RadialTokens: grid {shape} has one axis; it needs frames first, such as (frames, height, width) or "
                f"(frames, tokens)."
            )
        space, s = shape[1:], prod(shape[1:])
        terms: list[Term] = []
        p = 1
        while p == 1 or p < shape[0]:
            gap = FrameGap(0 if p == 1 else p, 2 * p - 1, max(1, -(-p // s)))
            reach = max(s // p - 1, 0)
            terms += [(gap, *rest) for rest in raster_band(space, -reach, reach)]
            p *= 2
        if self.sink:
            terms.append((Keys(0, 1), *(Everything() for _ in space)))
        return terms


def _raster(axes: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    """Raster position from coordinates (axes beyond the grid are ignored)."""
    place = torch.zeros_like(axes[0])
    for coordinate, length in zip(axes, shape, strict=False):
        place = place * length + coordinate
    return place


@dataclass(frozen=True)
class RadialBlocks(BlockPattern):
    """The published block mask: frames first in the sequence, text (if any) behind them.

    block: tokens of a query and of a key block, 128 or 64 in the published configurations.
    decay: factor on the width of bands between frames that are not neighbours; smaller is sparser.
    model: "wan" lets everybody see the first frame, "hunyuan" does not.
    own_block: every block sees itself. False is the published rule to the letter, by which frames that are not whole
        blocks can leave tokens that do not see themselves, or see nothing at all.

    Tokens of a frame need not be whole blocks: blocks then take the union of what their frames ask for. Blocks from
    the first that holds text or is not full on see, and are seen by, everybody. No token mask is ever built: a block
    of a frame pair is decided by counting, once for each band width and place of the frames in their blocks.
    """

    block: int = _UNIT
    decay: float = 1.0
    model: Literal["wan", "hunyuan"] = "wan"
    own_block: bool = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"RadialBlocks: block={self.block} must be at least 1; published: 128 and 64.")
        if not self.decay > 0:
            raise ValueError(f"RadialBlocks: decay={self.decay} must be positive; 1.0 leaves bands as they are.")
        if self.model not in ("wan", "hunyuan"):
            raise ValueError(f"RadialBlocks: model={self.model!r}; legal: 'wan' (first frame seen by all), 'hunyuan'.")

    @property
    def q_block(self) -> int:  # type: ignore[override]
        """Tokens of a query block."""
        return self.block

    @property
    def kv_block(self) -> int:  # type: ignore[override]
        """Tokens of a key block."""
        return self.block

    def check(self, layout: Layout) -> None:
        if layout.q != layout.kv:
            raise ValueError(f"RadialBlocks: queries on {layout.q!r} and keys on {layout.kv!r} must share one canvas.")
        first = layout.q.parts[0]
        if layout.q.grids != (first,) or len(first.axes) < 2 or len({p.times for p in layout.q.parts}) > 1:
            raise ValueError(
                f"RadialBlocks: {layout.q!r} must begin with its only grid, (frames, height, width) or (frames, "
                f"tokens); text follows it, such as Canvas((30, 48, 80), after=256)."
            )

    def block_mask(self, layout: Layout) -> Tensor:
        self.check(layout)
        shape = layout.q.parts[0].axes
        return _mask(self, shape[0], prod(shape[1:]), layout.q.size)[None]

    def width(self, gap: int, tokens: int) -> float:
        """Largest distance |k - l| of positions that see each other, for frames `gap` apart of `tokens` tokens."""
        if gap <= 1:
            return float(tokens)
        return max(2.0 ** (tokens.bit_length() - gap.bit_length()) * self.decay, float(self.block))

    def keeps(self, gap: int, tokens: int) -> bool:
        """Whether frames `gap` apart see each other at all."""
        share = 2.0 ** (tokens.bit_length() - gap.bit_length())
        return share >= _UNIT or gap % int(_UNIT / share) == 0


@lru_cache(maxsize=16)
@ordinary()
def _mask(spec: RadialBlocks, frames: int, tokens: int, total: int) -> Tensor:
    """Bool [blocks, blocks] for `frames` of `tokens` tokens in a sequence of `total`."""
    block, side = spec.block, -(-tokens // spec.block)
    count = -(-total // block)
    mask = torch.zeros(count + side, count + side, dtype=torch.bool)
    kept: dict[tuple[int, int, int], Tensor] = {}
    for i in range(frames):
        row, q_start = divmod(i * tokens, block)
        for j in range(frames):
            column, k_start = divmod(j * tokens, block)
            gap = abs(i - j)
            sink = spec.model == "wan" and j == 0
            if not sink and not spec.keeps(gap, tokens):
                continue
            reach = tokens if sink else min(int(spec.width(gap, tokens)), tokens)
            place = (reach, q_start, k_start)
            if place not in kept:
                kept[place] = pooled_band(tokens, reach, block, q_start, k_start)
            mask[row : row + side, column : column + side] |= kept[place]
    mask = mask[:count, :count].clone()
    text = frames * tokens // block
    mask[text:] = True
    mask[:, text:] = True
    if spec.own_block:
        mask.fill_diagonal_(True)
    return mask


def pooled_band(tokens: int, reach: int, block: int, q_start: int, k_start: int) -> Tensor:
    """Which blocks of one frame pair are kept, bool [side, side] with side = ceil(tokens / block).

    The band |k - l| <= reach of `tokens` x `tokens` positions lies q_start rows and k_start columns behind the corner
    of the first block; what passes the last block is not looked at. A block is kept if, among its columns that hold
    anything, more than 60 % are filled to more than a third.
    """
    side = -(-tokens // block)
    rows = torch.arange(side)[:, None, None] * block - q_start  # first position of a block
    columns = (torch.arange(side)[:, None] * block - k_start + torch.arange(block))[None]  # [1, side, block]
    low = torch.maximum(rows.clamp(min=0), columns - reach)
    high = torch.minimum((rows + block).clamp(max=tokens), columns + reach + 1)
    filled = (high - low).clamp(min=0)  # [side, side, block]
    filled = torch.where((columns >= 0) & (columns < tokens), filled, 0)
    dense, some = (3 * filled > block).sum(-1), (filled > 0).sum(-1)
    return 5 * dense > 3 * some
