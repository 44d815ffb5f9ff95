"""PAROAttention (arXiv 2506.16054) in diffusion transformers: `paro(pipe, plan)`, `handle.undo()`.

Each head reads the media tokens in an axis order of its own, in which its pattern becomes blocks, and runs over a
static block mask. Positions are untouched: queries and keys arrive rotated. `paro_calibration` makes the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.adapt.attach import Handle, attach
from glocal.adapt.paro_plan import ParoPlan, sequence
from glocal.adapt.records import Core, SiteCall
from glocal.adapt.sparse import Relation, SparseMethod, media_grid
from glocal.canvas import Canvas
from glocal.kernels.quant import Quant
from glocal.ops import Score
from glocal.plan.blockplan import BlockPlan
from glocal.plan.facts import declare_lasting
from glocal.plan.selection import plan_selection
from glocal.routing.partition import Partition
from glocal.routing.selection import from_mask


@dataclass(frozen=True)
class ParoSettings:
    """plan: a file of `ParoPlan.save`. quant: what queries and keys are rounded to ("int8", "int4", "fp8"), with the
    defaults of `Quant` for the rest; None keeps their type. empty: see `Paro`.
    """

    plan: str | Path
    quant: Literal["int8", "int4", "fp8"] | None = None
    empty: Literal["run", "drop"] = "run"


def paro_of(settings: ParoSettings) -> Paro:
    """The method from plain values."""
    quant = None if settings.quant is None else Quant(settings.quant)
    return Paro(ParoPlan.load(settings.plan), quant=quant, empty=settings.empty)


class Paro(SparseMethod):
    """The method. quant: rounds queries and keys (and more, if it says so); None keeps their type.

    empty: what heads do that the plan calls empty, "run" as in the published code or "drop" to zero.
    """

    cuts_words = False  # a plan is made for the length with hidden words

    def __init__(
        self,
        plan: ParoPlan,
        *,
        quant: Quant | None = None,
        empty: Literal["run", "drop"] = "run",
        backend: str = "auto",
    ) -> None:
        if empty not in ("run", "drop"):
            raise ValueError(f"paro: empty={empty!r}; legal: 'run', 'drop'.")
        self.plan, self.quant, self.empty, self.backend = plan, quant, empty, backend
        self._plans: dict[tuple[str, int], tuple[tuple[Any, ...], BlockPlan]] = {}  # the current one of each layer

    def score(self, call: SiteCall) -> Score:
        """As the host's, with the rounding asked for."""
        found = super().score(call)
        return found if self.quant is None else replace(found, quant=self.quant)

    def relation(self, q: Tensor, k: Tensor, call: SiteCall) -> Relation:
        """The plan of the layer for this part of the run; it is built when the run comes there."""
        axes, layer = media_grid(call, "paro"), call.site.layer
        if layer >= self.plan.orders.shape[0] or q.shape[1] != self.plan.orders.shape[1]:
            raise ValueError(
                f"paro: site {call.site.name!r} is layer {layer} with {q.shape[1]} heads, but the plan has "
                f"{self.plan.orders.shape[0]} layers of {self.plan.orders.shape[1]} heads; it is of another model."
            )
        time = self.plan.time(call.state.step, call.state.total, call.state.timestep)
        state = (time, call.layout.q, str(q.device))
        place = (call.site.component, layer)
        if place not in self._plans or self._plans[place][0] != state:
            part = blocks_of(call.layout.q, axes, self.plan.orders[layer], self.plan.block)
            if part.groups != self.plan.blocks:
                raise ValueError(
                    f"paro: {call.layout.nk} tokens are {part.groups} blocks of {self.plan.block}, but the plan has "
                    f"{self.plan.blocks}; a plan serves the resolution and length it was made for."
                )
            chosen = from_mask(call.layout, part, part, self.plan.mask(time, layer)[None])
            made = plan_selection(chosen, device=q.device)
            declare_lasting(made.full.index)
            self._plans[place] = (state, made)
        return self._plans[place][1]

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, H, N, D]."""
        out = super().core(q, k, v, call, inner)
        if self.empty == "drop" and self.plan.empty is not None:
            gone = self.plan.empty[call.site.layer].to(out.device)
            out = torch.where(gone[:, None, None], 0, out)
        return out


def blocks_of(canvas: Canvas, axes: tuple[int, ...], orders: Tensor, block: int) -> Partition:
    """The blocks of every head: words first, then the media tokens in the order of the head.

    orders: int [heads]. Returns members [1, heads, groups, block].
    """
    media = canvas.indices(canvas.grid.name)
    rest = [canvas.indices(p.name) for p in canvas.parts if not p.is_grid]
    words = torch.cat(rest) if rest else media[:0]
    lists = {n: sequence(axes, words, media, n) for n in set(orders.tolist())}
    members = torch.stack([lists[n] for n in orders.tolist()])  # [heads, N]
    members = pad(members, (0, -members.shape[1] % block), value=-1).unflatten(1, (-1, block))
    return Partition(members[None].int(), "axis orders", fixed=True)


def paro(
    model: Any,
    plan: ParoPlan | str | Path,
    *,
    quant: Quant | None = None,
    empty: Literal["run", "drop"] = "run",
    backend: str = "auto",
) -> Handle:
    """Put PAROAttention into a pipeline or model.

    plan: of `paro_calibration.calibrate`, `paro_plan.read_published`, or a file of `ParoPlan.save`.
    quant: rounding of queries, keys and weights; None for none. Raises ValueError for a plan of other layers, heads or
    resolution when the first call comes.
    """
    found = plan if isinstance(plan, ParoPlan) else ParoPlan.load(plan)
    return attach(model, Paro(found, quant=quant, empty=empty, backend=backend))
