"""Local windows on a large grid under the guidance of a small one: the masks of Scale-DiT (arXiv 2510.16325).

The sequence is [text, image, low]: words, the tokens of the large image, those of the same image in low resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from glocal.canvas import Coords, Layout
from glocal.patterns.base import Pattern

TEXT, IMAGE, LOW = "text", "image", "low"
_FEW = 256  # training: so many low tokens see each other and are seen by all


@dataclass(frozen=True)
class GuidedWindows(Pattern):
    """Who sees whom between words, image and low-resolution tokens; parts are called "text", "image" and "low".

    window: rows and columns of a window, in image tokens.
    local: "sliding": image tokens see each other up to half a window away; "four": tokens of one window and of its
        four neighbours, windows being cut one token before the first (what sticks out wraps around).
    phase: "inference": an image token sees the low tokens of its own window and of the windows numbered one less and
        one more, low tokens see each other half a (scaled) window away and no words. "training": up to 256 low tokens
        are seen by every image token and by each other, more only group by group; low tokens see the words.
    text_sees_low: words see low tokens too. guided: image tokens see low tokens at all.
    window_first: groups of training are windows one after another, not runs of the raster.
    low_window: rows and columns of a window of low tokens at inference, for their order and how far they see each
        other; None: the part of the low grid that lies under a window.
    """

    window: tuple[int, int] = (16, 16)
    local: Literal["sliding", "four"] = "sliding"
    phase: Literal["inference", "training"] = "inference"
    text_sees_low: bool = False
    guided: bool = True
    window_first: bool = False
    low_window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", tuple(self.window))
        if len(self.window) != 2 or min(self.window) < 1:
            raise ValueError(f"GuidedWindows: window={self.window} must be rows and columns, each at least 1.")
        for name, legal in (("local", ("sliding", "four")), ("phase", ("inference", "training"))):
            if getattr(self, name) not in legal:
                raise ValueError(
                    f"GuidedWindows: {name}={getattr(self, name)!r}; legal: {', '.join(map(repr, legal))}."
                )

    def check(self, layout: Layout) -> None:
        names = {p.name for p in layout.q.parts}
        if layout.q != layout.kv or IMAGE not in names or not names <= {TEXT, IMAGE, LOW}:
            raise ValueError(f"GuidedWindows: {layout.q!r}; legal: parts 'text', 'image' and 'low' on both sides.")
        if self.phase == "inference" and LOW in names:
            self.ratio(layout)

    def ratio(self, layout: Layout) -> tuple[int, int]:
        """Image tokens to one low token, along rows and columns; ValueError where that is no whole number."""
        image, low = (layout.q.parts[layout.q.number(name)].axes for name in (IMAGE, LOW))
        found = tuple(a // b for a, b in zip(image, low, strict=True))
        fits = all(a == b * r for a, b, r in zip(image, low, found, strict=True))
        if not fits or any(w % r for w, r in zip(self.window, found, strict=True)):
            raise ValueError(
                f"GuidedWindows: an image of {image} tokens over {low} low tokens with window={self.window}; legal: "
                "whole ratios on both axes that divide the window."
            )
        return found[0], found[1]

    def cells(self, row: Tensor, column: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Row and column of the shifted window ("four") that holds a token."""
        tall, wide = self.window
        return (row + 1) % shape[0] // tall, (column + 1) % shape[1] // wide

    def low_tile(self, layout: Layout) -> tuple[int, int]:
        """Rows and columns of a window of low tokens."""
        if self.low_window is not None:
            return self.low_window
        ratio = self.ratio(layout)
        return self.window[0] // ratio[0], self.window[1] // ratio[1]

    def number(self, row: Tensor, column: Tensor, columns: int, ratio: tuple[int, int] = (1, 1)) -> Tensor:
        """Raster number of a token's window; `columns` and `ratio` of its grid."""
        tall, wide = self.window[0] // ratio[0], self.window[1] // ratio[1]
        return row // tall * ceil(columns / wide) + column // wide

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        (row, column), (row_k, column_k) = q.axes, k.axes
        if self.local == "sliding":
            tall, wide = half(self.window)
            image = ((row - row_k).abs() <= tall) & ((column - column_k).abs() <= wide)
        else:
            (a, b), (c, d) = self.cells(row, column, shape), self.cells(row_k, column_k, shape)
            image = (a - c).abs() + (b - d).abs() <= 1
        if LOW not in {p.name for p in layout.q.parts}:
            return image
        if self.phase == "inference":
            tall, wide = half(self.low_tile(layout))
            low = ((row - row_k).abs() <= tall) & ((column - column_k).abs() <= wide)
        else:
            count = layout.q.parts[layout.q.number(LOW)].tokens
            start = count_before(layout)
            group = (q.index - start) // _FEW == (k.index - start) // _FEW
            low = group if count > _FEW else torch.ones_like(group)
        return torch.where(q.part == layout.q.number(LOW), low, image)

    def across(self, q: Coords, k: Coords, layout: Layout, head: int | None) -> Tensor:
        numbers = {p.name: n for n, p in enumerate(layout.q.parts)}
        text, image, low = (numbers.get(name, -1) for name in (TEXT, IMAGE, LOW))
        to_text = (k.part == text) & ((q.part != low) | (self.phase == "training"))
        from_text = (q.part == text) & ((k.part != low) | self.text_sees_low)
        seen = to_text | from_text
        if low < 0 or not self.guided:
            return seen
        return seen | ((q.part == image) & (k.part == low) & self._guide(q, k, layout))

    def _guide(self, q: Coords, k: Coords, layout: Layout) -> Tensor:
        """Whether image tokens q see low tokens k."""
        image, low = (layout.q.parts[layout.q.number(name)] for name in (IMAGE, LOW))
        if self.phase == "inference":
            ratio = self.ratio(layout)
            mine = self.number(q.axes[0], q.axes[1], image.axes[1])
            theirs = self.number(k.axes[0], k.axes[1], low.axes[1], ratio)
            return (mine - theirs).abs() <= 1
        if low.tokens <= _FEW:
            return torch.ones_like(q.index == k.index)
        area = self.window[0] * self.window[1]
        group = (k.index - count_before(layout)) // area
        if self.window_first:
            windows = ceil(image.axes[0] / self.window[0]) * ceil(image.axes[1] / self.window[1])
            each = ceil(windows / ceil(low.tokens / area))
            return self.number(q.axes[0], q.axes[1], image.axes[1]) // each == group
        groups = max(low.tokens // area, 1)
        mine = (q.axes[0] * image.axes[1] + q.axes[1]) // (image.tokens // groups)
        return (mine == group) & (mine < groups)


def half(window: tuple[int, int]) -> tuple[int, int]:
    """How far a sliding window reaches to each side."""
    return window[0] // 2, window[1] // 2


def count_before(layout: Layout) -> int:
    """Tokens of the sequence in front of the low ones."""
    return sum(p.tokens for p in layout.q.parts[: layout.q.number(LOW)])
