"""Everything that changes a logit: scale, soft-cap and additive biases, as data that kernels read.

logit = softcap(scale * q k) + sum of biases
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.kernels.call import Bias, DenseBias, TableBias
from glocal.kernels.quant import Quant


@dataclass(frozen=True, eq=False)
class Dense:
    """values: [B|1, H|1, Nq|1, Nk|1] (leading axes may be missing), added as it is; -inf hides."""

    values: Tensor

    def lower(self, layout: Layout) -> Bias:
        """The form kernels read."""
        values = self.values.reshape((1,) * (4 - self.values.dim()) + tuple(self.values.shape))
        wanted = (layout.nq, layout.nk)
        for axis, size in zip((2, 3), wanted, strict=True):
            if values.shape[axis] not in (1, size):
                raise ValueError(
                    f"Dense bias of shape {tuple(self.values.shape)} does not broadcast to {wanted[0]} queries x "
                    f"{wanted[1]} keys."
                )
        return DenseBias(values)


@dataclass(frozen=True, eq=False)
class PerKey:
    """values: [B|1, H|1, Nk] or [Nk], added to every logit of a key: log-counts, saliency, -inf to hide it."""

    values: Tensor

    def lower(self, layout: Layout) -> Bias:
        """The form kernels read."""
        values = self.values.reshape((1,) * (3 - self.values.dim()) + tuple(self.values.shape))
        if values.shape[-1] != layout.nk:
            raise ValueError(
                f"PerKey bias of shape {tuple(self.values.shape)} needs {layout.nk} keys on its last axis."
            )
        return DenseBias(values[:, :, None, :])


@dataclass(frozen=True, eq=False)
class Relative:
    """A relative-position table inside one grid: ``table[h, key - query + centre]`` on every axis.

    table: [H|1, *extent], extent odd (2 r + 1 reaches r steps either way); differentiable.
    step: tokens a table step, one for all axes or one an axis (the dilation); places are ``coordinate // step``.
    sign: +1 for key - query, -1 for query - key.
    part: name of the grid; None for the only one. Offsets beyond the table add nothing, so a table that is too
        small for a pattern is refused only where the caller says how far the pattern reaches.
    within: the caller knows that no visible pair lies beyond the table. It is then read as it is; otherwise it gets
        room for all offsets of the grid.
    """

    table: Tensor
    step: int | tuple[int, ...] = 1
    sign: int = 1
    part: str | None = None
    within: bool = False

    def lower(self, layout: Layout) -> Bias:
        """The form kernels read."""
        extent = tuple(self.table.shape[1:])
        name, axes = _grid(layout.kv, self.part)
        rank = len(axes)
        if len(extent) != rank or any(n % 2 == 0 for n in extent) or self.sign not in (1, -1):
            raise ValueError(
                f"Relative: table of shape {tuple(self.table.shape)} must be [heads, {rank} odd extents] for the grid "
                f"{name!r}, and sign={self.sign} must be 1 or -1."
            )
        steps = (self.step,) * rank if isinstance(self.step, int) else tuple(self.step)
        # Inner axes get room behind the table for any offset of the canvas, so that offsets beyond it cannot alias:
        # one that overshoots, or falls short and borrows from the row before, lands on a pad. Rows past the outermost
        # axis are past the table.
        room, padded = list(extent), self.table
        if not self.within:
            room[1:] = [max(e, -(-n // s) + e // 2) for e, n, s in zip(extent[1:], axes[1:], steps[1:], strict=True)]
            padded = torch.nn.functional.pad(self.table, _pads(extent, room))
        strides = tuple(prod(room[axis + 1 :]) for axis in range(rank))
        centre = sum(e // 2 * s for e, s in zip(extent, strides, strict=True))
        far = 4 * prod(room) + 4 * sum(n * s for n, s in zip(axes, strides, strict=True))
        device = str(self.table.device)
        signed = tuple(self.sign * stride for stride in strides)
        present = ((layout.q_start, layout.nq), (layout.kv_start, layout.nk))
        rules = ((-centre, -far), (0, 2 * far))
        q_code, k_code = _codes(layout.q, layout.kv, present, rules, (name, steps, signed, device))
        return TableBias(padded.flatten(1), q_code, k_code)


@torch.compiler.assume_constant_result
def _grid(canvas: Canvas, part: str | None) -> tuple[str, tuple[int, ...]]:
    """Name and axis lengths of the grid meant; a constant of a compiled graph."""
    found = canvas.grid if part is None else canvas.parts[canvas.number(part)]
    return found.name, found.axes


def _pads(extent: tuple[int, ...], room: list[int]) -> list[int]:
    pads: list[int] = []
    for have, want in zip(reversed(extent), reversed(room), strict=True):
        pads += [0, want - have]
    return pads


@torch.compiler.assume_constant_result
def _codes(
    q: Canvas,
    k: Canvas,
    present: tuple[tuple[int, int], tuple[int, int]],
    rules: tuple[tuple[int, int], tuple[int, int]],
    where: tuple[str, tuple[int, ...], tuple[int, ...], str],
) -> tuple[Tensor, Tensor]:
    """Table codes of queries and keys, int64 [Nq], [Nk]; constants of a compiled graph, hence plain arguments.

    present: first token and count of each side. rules: what is added to the codes of each side, and the code of tokens
    outside the grid. where: name of the grid, steps and signed strides of its axes, device.
    """
    return _known_codes(q, k, present, rules, where)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what evaluation leaves in the cache serves training too
def _known_codes(
    q: Canvas,
    k: Canvas,
    present: tuple[tuple[int, int], tuple[int, int]],
    rules: tuple[tuple[int, int], tuple[int, int]],
    where: tuple[str, tuple[int, ...], tuple[int, ...], str],
) -> tuple[Tensor, Tensor]:
    name, steps, strides, device = where
    codes = []
    for canvas, (start, count), (offset, other) in zip((q, k), present, rules, strict=True):
        coords = canvas.coords(torch.arange(start, start + count, device=device))
        code = torch.full_like(coords.index, offset)
        for axis, (step, stride) in enumerate(zip(steps, strides, strict=True)):
            code = code + coords.axes[axis] // step * stride
        codes.append(torch.where(coords.part == canvas.number(name), code, other))
    return codes[0], codes[1]


@dataclass(frozen=True, eq=False)
class PerPart:
    """A bias for each pair of parts: {(query part, key part): [H] or [1] tensor}; missing pairs get nothing."""

    values: Mapping[tuple[str, str], Tensor]

    def lower(self, layout: Layout) -> Bias:
        """The form kernels read."""
        some = next(iter(self.values.values()))
        nq, nk = len(layout.q.parts), len(layout.kv.parts)
        zero = torch.zeros_like(some)
        rows = {(layout.q.number(a), layout.kv.number(b)): v for (a, b), v in self.values.items()}
        table = torch.stack([rows.get((a, b), zero) for a in range(nq) for b in range(nk)], -1)  # [H|1, parts^2]
        q_part, k_part = layout.q_coords(device=some.device).part, layout.kv_coords(device=some.device).part
        return TableBias(table, -q_part * nk, k_part)


Term = Dense | PerKey | Relative | PerPart


@dataclass(frozen=True, eq=False)
class Score:
    """How logits are made.

    scale: factor on q k; None is head_dim ** -0.5. A tensor [H] gives every query head its own.
    softcap: logits become ``softcap * tanh(logits / softcap)``.
    bias: terms added afterwards; all are differentiable.
    dropout: probability of dropping a weight in training, drawn from `generator`.
    quant: round q, k, weights and values as it says (forward only); None computes exactly. Nothing rounds unasked.
    """

    scale: float | Tensor | None = None
    softcap: float | None = None
    bias: tuple[Term, ...] = ()
    dropout: float = 0.0
    generator: torch.Generator | None = None
    quant: Quant | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bias, (tuple, list)):
            raise TypeError(f"Score: bias is a {type(self.bias).__name__}; legal: a tuple of terms, as in (Dense(t),).")
        if self.quant is not None and not isinstance(self.quant, Quant):
            raise TypeError(
                f"Score: quant={self.quant!r}; legal: None or a Quant, such as Quant('int8', 'none', (32, 64))."
            )
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"Score: softcap={self.softcap} must be positive; None means no cap.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Score: dropout={self.dropout} must lie in [0, 1).")
