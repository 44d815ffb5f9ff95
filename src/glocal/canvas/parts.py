"""Token geometry: a canvas is a list of parts, each a grid of tokens or a flat run, repeated where needed.

    Canvas((30, 48, 80))                              one video grid, raster order
    Canvas((64, 64), before=77)                       77 text tokens, then an image grid
    Canvas([Part("camera", 1, times=8), Part("register", 4, times=8), Part("patch", (24, 32), times=8)])

Consecutive parts with the same `times` > 1 are repeated together: the last line is 8 frames of 1 + 4 + 768 tokens,
and the patches form one grid of 8 x 24 x 32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from glocal._kept import ordinary


@dataclass(frozen=True)
class Part:
    """A named piece of a token sequence.

    name: unique in its canvas.
    shape: a tuple of axis lengths makes a grid (patterns speak about pairs inside one grid); an int makes a flat run.
    times: how often the part is repeated; the repeat is the leading axis of a repeated grid.
    scale, offset: cell x of the grid lies at ``x * scale + offset`` of the frame that all parts share; one value, or
        one for each axis.
    """

    name: str
    shape: int | tuple[int, ...]
    times: int = 1
    scale: float | tuple[float, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        shape = self.shape if isinstance(self.shape, int) else tuple(int(n) for n in self.shape)
        object.__setattr__(self, "shape", shape)
        lengths = (shape,) if isinstance(shape, int) else shape
        if len(lengths) == 0 or min(lengths) < 0:
            raise ValueError(f"Part {self.name!r}: shape={self.shape!r} needs at least one axis, none negative.")
        if self.times < 1:
            raise ValueError(f"Part {self.name!r}: times={self.times} must be at least 1.")

    @property
    def is_grid(self) -> bool:
        """Whether the part has geometry of its own."""
        return not isinstance(self.shape, int)

    @property
    def once(self) -> int:
        """Tokens of one repeat."""
        return self.shape if isinstance(self.shape, int) else prod(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """Axis lengths with the repeats as the leading axis where there are several."""
        shape = (self.shape,) if isinstance(self.shape, int) else self.shape
        return (self.times, *shape) if self.times > 1 else shape

    @property
    def tokens(self) -> int:
        """Tokens of all repeats."""
        return self.once * self.times


class Canvas:
    """A token sequence as a list of parts; immutable and hashable.

    parts: one grid shape such as ``(30, 48, 80)``, or a sequence of `Part`.
    before, after: tokens in a flat run named "before" / "after" around a single grid.
    arrives: name of the order in which tokens already lie ("raster", or a name from `glocal.canvas.orders`).
    Raises ValueError when names repeat or a shape is illegal.
    """

    __slots__ = ("__dict__", "arrives", "parts")

    def __init__(
        self, parts: Sequence[int] | Sequence[Part], *, before: int = 0, after: int = 0, arrives: str = "raster"
    ) -> None:
        if isinstance(parts, (int, str, Part)):
            raise TypeError(f"Canvas: parts={parts!r} must be axis lengths such as (30, 48, 80) or a list of Part.")
        parts = tuple(parts)  # type: ignore[assignment]
        if parts and all(hasattr(p, "__index__") for p in parts):  # numbers of numpy too
            grid = Part("grid", parts)  # type: ignore[arg-type]
            parts = tuple(p for p in (Part("before", before), grid, Part("after", after)) if p is grid or p.tokens > 0)
        elif before or after:
            raise ValueError("Canvas: before= and after= go with one grid shape; with parts, add a flat Part instead.")
        if not parts or not all(isinstance(p, Part) for p in parts):
            raise ValueError(f"Canvas: parts={parts!r} must be axis lengths such as (30, 48, 80) or a list of Part.")
        names = [p.name for p in parts]  # type: ignore[union-attr]
        if len(set(names)) != len(names):
            raise ValueError(f"Canvas: part names {names} repeat; give each part its own name.")
        self.parts: tuple[Part, ...] = parts  # type: ignore[assignment]
        self.arrives = arrives

    @cached_property
    def size(self) -> int:
        """Number of tokens."""
        return sum(p.tokens for p in self.parts)

    @property
    def grids(self) -> tuple[Part, ...]:
        """The parts that are grids."""
        return tuple(p for p in self.parts if p.is_grid)

    @property
    def grid(self) -> Part:
        """The only grid of the canvas; ValueError if there are none or several."""
        if len(self.grids) != 1:
            raise ValueError(f"{self!r} has {len(self.grids)} grids; name the part instead.")
        return self.grids[0]

    def number(self, name: str) -> int:
        """Position of the part called `name`."""
        for number, part in enumerate(self.parts):
            if part.name == name:
                return number
        raise ValueError(f"{self!r} has no part {name!r}; it has {[p.name for p in self.parts]}.")

    def runs(self) -> Iterable[tuple[int, int, Tensor]]:
        """For each part: its number, its token count and the linear indices of its tokens in grid order."""
        start = 0
        for times, numbered in groupby(enumerate(self.parts), key=lambda item: item[1].times):
            group = list(numbered)
            if times == 1:
                for number, part in group:
                    yield number, part.tokens, torch.arange(start, start + part.tokens, device="cpu")
                    start += part.tokens
                continue
            period, inside = sum(p.once for _, p in group), 0
            repeats = torch.arange(times, device="cpu")[:, None] * period + start  # [times, 1]
            for number, part in group:
                yield number, part.tokens, (repeats + inside + torch.arange(part.once, device="cpu")).flatten()
                inside += part.once
            start += period * times

    def indices(self, name: str) -> Tensor:
        """Linear indices (int64) of the tokens of one part, in grid order."""
        wanted = self.number(name)
        return next(index for number, _, index in self.runs() if number == wanted)

    @cached_property
    @ordinary()
    def _table(self) -> Coords:
        rank = max(len(p.axes) for p in self.parts)
        part = torch.zeros(self.size, dtype=torch.long)
        axes = torch.zeros(rank, self.size, dtype=torch.long)
        for number, tokens, index in self.runs():
            part[index] = number
            left = torch.arange(tokens)
            for axis in reversed(range(len(self.parts[number].axes))):
                length = self.parts[number].axes[axis]
                axes[axis, index] = left % max(length, 1)
                left = left // max(length, 1)
        return Coords(part, tuple(axes), torch.arange(self.size))

    def coords(self, index: Tensor | None = None, device: torch.device | str | None = None) -> Coords:
        """Coordinates of the tokens at `index` (any shape, int64; default: all tokens in order)."""
        table = self._table
        place = device if device is not None else (index.device if index is not None else table.index.device)
        if index is not None:
            index = index.to(table.index.device)
            table = Coords(table.part[index], tuple(a[index] for a in table.axes), index)
        return table.to(place)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Canvas) and (self.parts, self.arrives) == (other.parts, other.arrives)

    def __hash__(self) -> int:
        return hash((self.parts, self.arrives))

    def __repr__(self) -> str:
        def word(p: Part) -> str:
            shape = "x".join(map(str, p.shape)) if isinstance(p.shape, tuple) else str(p.shape)
            return f"{p.name}={shape}" + (f"*{p.times}" if p.times > 1 else "")

        return f"Canvas({', '.join(map(word, self.parts))})"


@dataclass(frozen=True)
class Coords:
    """Where tokens are: number of the part, grid coordinate per axis (0 where a part has fewer axes), linear index.

    All tensors are int64 and broadcast against each other.
    """

    part: Tensor
    axes: tuple[Tensor, ...]
    index: Tensor

    def to(self, device: torch.device | str) -> Coords:
        """The same coordinates on another device."""
        return Coords(self.part.to(device), tuple(a.to(device) for a in self.axes), self.index.to(device))

    def unsqueeze(self, dim: int) -> Coords:
        """A new axis, so that queries [n, 1] meet keys [1, m]."""
        return Coords(self.part.unsqueeze(dim), tuple(a.unsqueeze(dim) for a in self.axes), self.index.unsqueeze(dim))
