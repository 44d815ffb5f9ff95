"""Everything that changes a logit: scale, soft-cap and additive biases, as data that kernels read.

logit = softcap(scale * q k) + sum of biases
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from glocal.canvas import Canvas, Coords, Layout
from glocal.kernels.call import Bias, DenseBias, TableBias


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
    """

    table: Tensor
    step: int | tuple[int, ...] = 1
    sign: int = 1
    part: str | None = None

    def lower(self, layout: Layout) -> Bias:
        """The form kernels read."""
        extent = tuple(self.table.shape[1:])
        name = layout.kv.grid.name if self.part is None else self.part
        rank = len(layout.kv.parts[layout.kv.number(name)].axes)
        if len(extent) != rank or any(n % 2 == 0 for n in extent) or self.sign not in (1, -1):
            raise ValueError(
                f"Relative: table of shape {tuple(self.table.shape)} must be [heads, {rank} odd extents] for the grid "
                f"{name!r}, and sign={self.sign} must be 1 or -1."
            )
        steps = (self.step,) * rank if isinstance(self.step, int) else self.step
        # Every axis gets room for any offset of the canvas, so that offsets beyond the table cannot alias.
        axes = layout.kv.parts[layout.kv.number(name)].axes
        room = [max(e, 2 * (-(-n // s)) + 1) for e, n, s in zip(extent, axes, steps, strict=True)]
        padded = _embed(self.table, room)
        strides = [prod(room[axis + 1 :]) for axis in range(rank)]
        centre = sum(r // 2 * s for r, s in zip(room, strides, strict=True))
        device = self.table.device
        codes = []
        for canvas, coords in (
            (layout.q, layout.q_coords(device=device)),
            (layout.kv, layout.kv_coords(device=device)),
        ):
            codes.append(_codes(canvas, coords, name, steps, strides))
        (q_code, q_in), (k_code, k_in) = codes
        far = 4 * padded[0].numel()
        q_code = torch.where(q_in, self.sign * q_code - centre, -far)
        return TableBias(padded.flatten(1), q_code, torch.where(k_in, self.sign * k_code, 2 * far))


def _codes(
    canvas: Canvas, coords: Coords, name: str, steps: tuple[int, ...], strides: list[int]
) -> tuple[Tensor, Tensor]:
    code = torch.zeros_like(coords.index)
    for axis, (step, stride) in enumerate(zip(steps, strides, strict=True)):
        code = code + coords.axes[axis] // step * stride
    return code, coords.part == canvas.number(name)


def _embed(table: Tensor, room: list[int]) -> Tensor:
    pads: list[int] = []
    for have, want in zip(reversed(table.shape[1:]), reversed(room), strict=True):
        pads += [(want - have) // 2, (want - have) // 2]
    return torch.nn.functional.pad(table, pads)


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
    """

    scale: float | Tensor | None = None
    softcap: float | None = None
    bias: tuple[Term, ...] = ()
    dropout: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"Score: softcap={self.softcap} must be positive; None means no cap.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Score: dropout={self.dropout} must lie in [0, 1).")
