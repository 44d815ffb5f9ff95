"""What the sparse-attention methods share: which calls stay dense, what ran, and the words of refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glocal.adapt.attach import Method
from glocal.adapt.records import Core, Site, SiteCall
from glocal.adapt.visible_words import without_hidden
from glocal.ops import Score, attend
from glocal.ops.epilogue import Epilogue, GroupEpilogue
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.routing.selection import Selection

Relation = Pattern | Selection | BlockPlan


@dataclass(frozen=True)
class Schedule:
    """Which calls stay dense: the first or last steps of a run, the first layers, any layers by number.

    layers: numbers that stay dense. components: other numbers for the first steps of single components of a pipeline
    (its experts), counted from where each begins.
    """

    first_steps: int = 0
    last_steps: int = 0
    first_layers: int = 0
    layers: frozenset[int] = frozenset()
    components: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("first_steps", "last_steps", "first_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"Schedule: {name}={getattr(self, name)} must not be negative.")

    def dense(self, call: SiteCall) -> str | None:
        """Why a call stays dense, or None. Raises ValueError where the number of steps is needed and unknown."""
        site, state = call.site, call.state
        if site.layer < self.first_layers or site.layer in self.layers:
            return "layer"
        if site.component in self.components:
            begun = state.store.setdefault(("", f"first step of {site.component}"), state.step)
            if state.step - begun < self.components[site.component]:
                return "first steps"
        elif max(state.step, 0) < self.first_steps:
            return "first steps"
        if self.last_steps:
            if state.total is None:
                raise ValueError(
                    f"Schedule: last_steps={self.last_steps} needs the number of steps of the run, which only a "
                    "pipeline says; attach to the pipeline, or set handle.state.total before each run."
                )
            if state.step >= state.total - self.last_steps:
                return "last steps"
        return None


@dataclass
class Ran:
    """What ran at one site of `heads` heads: calls, sparse ones, dense ones by reason, kernels by name, and the pairs
    of sparse calls as a share of all (`visited`: what a kernel touched; `kept`: what it used), summed.
    """

    heads: int
    calls: int = 0
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    _visited: Tensor | float = 0.0
    _kept: Tensor | float = 0.0

    @property
    def visited(self) -> float:
        """Mean over sparse calls, 1.0 if there were none."""
        return float(self._visited) / self.sparse if self.sparse else 1.0

    @property
    def kept(self) -> float:
        """Mean over sparse calls, 1.0 if there were none."""
        return float(self._kept) / self.sparse if self.sparse else 1.0

    def add(self, plan: BlockPlan, kernel: str, pattern: bool) -> None:
        """A sparse call. What a pattern keeps its plan knows; block lists are counted on the device, without wait."""
        self.sparse += 1
        self.kernels[kernel] += 1
        visited, kept = (plan.visited, plan.kept) if pattern else _counted(plan)
        self._visited, self._kept = self._visited + visited, self._kept + kept


def _counted(plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Visited and kept shares of a plan whose blocks are whole but for pads, which lie alike in all heads."""
    sizes = ((plan.q_order, plan.q_block), (plan.kv_order, plan.kv_block))
    q_valid, k_valid = ((order[0, 0].unflatten(0, (-1, n)) >= 0).sum(-1, dtype=torch.int32) for order, n in sizes)
    blocks, pairs = torch.zeros(2, plan.full.count.shape[0], dtype=torch.long, device=plan.device)
    for lists in (plan.full, plan.partial):
        keys = torch.where(lists.live, k_valid[lists.index.long()], 0).sum(-1)  # [U, blocks]
        blocks, pairs = blocks + lists.count.sum(-1), pairs + (keys.long() * q_valid).sum(-1)
    total = plan.layout.nq * plan.layout.nk
    owner = plan.owner.long()
    return blocks[owner].double().mean() * plan.q_block * plan.kv_block / total, pairs[owner].double().mean() / total


class SparseMethod(Method):
    """Base: acts at `core` of self and joint attention. Subclasses say with whom each query attends (`relation`), and
    may rectify (`epilogue`).

    ran: by (component, site name), what ran. cuts_words: hidden words at the end are cut off before all that; a method
    whose plan counts them says False.
    """

    schedule = Schedule()
    backend = "auto"
    cuts_words = True

    @property
    def ran(self) -> dict[tuple[str, str], Ran]:
        """What ran since the method was made."""
        return self.__dict__.setdefault("_ran", {})

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Self and joint attention; cross attention stays dense."""
        return tuple(s for s in sites if s.kind != "cross")

    def relation(self, q: Tensor, k: Tensor, call: SiteCall) -> Relation:
        """Who sees whom in this call; q, k [B, H, N, D]."""
        raise TypeError(f"{type(self).__name__} must define relation().")

    def epilogue(
        self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, relation: Relation
    ) -> Epilogue | GroupEpilogue | None:
        """What is done to the output of the sparse attention."""
        return None

    def score(self, call: SiteCall) -> Score:
        """How logits are made: as the host makes them."""
        return Score(scale=call.site.scale, softcap=call.site.softcap)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, H, N, D]."""
        ran = self.ran.setdefault((call.site.component, call.site.name), Ran(q.shape[1]))
        ran.calls += 1
        why = self.schedule.dense(call)
        if why is not None:
            ran.dense[why] += 1
            return inner(q, k, v, call)
        shorter = without_hidden(call.layout) if self.cuts_words else None
        if shorter is None:
            return self._sparse(q, k, v, call, ran)
        q, k, v = (t[:, :, : shorter.nq] for t in (q, k, v))
        out = self._sparse(q, k, v, replace(call, layout=shorter), ran)
        return torch.nn.functional.pad(out, (0, 0, 0, call.layout.nq - shorter.nq))

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, ran: Ran) -> Tensor:
        """A call that is not dense; q, k, v [B, H, N, D] -> [B, H, N, D]."""
        relation = self.relation(q, k, call)
        done = attend(q, k, v, relation, canvas=call.layout, score=self.score(call), backend=self.backend)
        if done.plan is None:  # a kernel without plans: small cases
            ran.sparse += 1
            ran.kernels[done.picked.name] += 1
            ran._visited, ran._kept = ran._visited + done.kept, ran._kept + done.kept
        else:
            ran.add(done.plan, done.picked.name, isinstance(relation, Pattern))
        after = self.epilogue(q, k, v, call, relation)
        return done.out if after is None else after.apply(done.out)

    @property
    def kept(self) -> float:
        """Share of pairs that attention used, mean over all calls; a dense call keeps all."""
        calls = sum(r.calls for r in self.ran.values())
        total = sum(r.kept * r.sparse + (r.calls - r.sparse) for r in self.ran.values())
        return total / calls if calls else 1.0


def one_an_axis(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as a tuple; TypeError, before a model is touched, for what is no whole number for each axis."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not all(isinstance(n, int) for n in sizes):
        raise TypeError(f"{name}={sizes!r}; legal: a whole number for each axis of the media grid, such as (3, 3, 3).")
    return tuple(sizes)


def media_grid(call: SiteCall, who: str) -> tuple[int, ...]:
    """Axes of the only grid of a call; ValueError, in the words of `who`, where there is none or several."""
    raster = getattr(call.state.forward, "raster", None)
    canvas = call.layout.q if raster is None else raster.q
    if len(canvas.grids) != 1:
        raise ValueError(
            f"{who}: site {call.site.name!r} attends on {canvas!r}; legal: one grid of media tokens and text around it."
        )
    return canvas.grid.axes
