"""What one forward of a diffusers transformer says: where the tokens lie, the noise level, which rows are guided.

Guidance comes in two forms. Two calls at one timestep: the same latents with other text; the first call is the guided
one, as in the pipelines of diffusers. One call with a doubled batch: the first half is without guidance, its latents
equal those of the second half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from glocal.adapt.records import Branch, RunState
from glocal.canvas import Canvas, Layout, Part


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward. layout: of its self or joint attention. level: noise level, 1 is pure noise. latents [B, ...],
    text [B, L, C]: what it was given. text_mask [B, L]: which words the cross attention may look at, None for all.
    raster: where tokens would lie had no method put them in another order; None where none has.
    """

    layout: Layout
    level: float
    latents: Tensor
    text: Tensor
    text_mask: Tensor | None = None
    raster: Layout | None = None


@lru_cache(maxsize=64)
def canvas_of(*parts: tuple[str, int | tuple[int, ...]], arrives: str = "raster") -> Canvas:
    """A canvas of named parts; parts without tokens are left out."""
    made = [Part(name, shape) for name, shape in parts]
    return Canvas([part for part in made if part.tokens > 0], arrives=arrives)


class Follower:
    """Keeps a `RunState` up to date from one forward to the next; the experts of one pipeline share the state."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def advance(self, forward: Forward) -> None:
        """A forward begins."""
        rows = forward.latents.shape[0]
        half = rows // 2
        found: tuple[tuple[int, Branch], ...]
        if rows % 2 == 0 and _guided(_rows(forward, 0, half), _rows(forward, half, rows)):
            branch: Branch = "both"
            found = (*((row, "uncond") for row in range(half)), *((row, "cond") for row in range(half)))
        else:
            branch = self._branch(forward)
            found = tuple((row, branch) for row in range(rows))
        self.state.advance(forward.level, branch)
        self.state.forward = forward
        self.state.rows = found

    def _branch(self, forward: Forward) -> Branch:
        last = self.state.forward
        second = isinstance(last, Forward) and last.level == forward.level and self.state.branches == {"cond"}
        return "uncond" if second and _guided(last, forward) else "cond"


def _rows(forward: Forward, start: int, end: int) -> Forward:
    return replace(forward, latents=forward.latents[start:end], text=forward.text[start:end])


def _guided(one: Forward, other: Forward) -> bool:
    """Whether two forwards are the same latents under different text."""
    return _same(one.latents, other.latents) and not _same(one.text, other.text)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))
