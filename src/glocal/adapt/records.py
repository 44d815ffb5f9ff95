"""What a method learns about the model it sits in: attention sites, the running state, and one call of one site."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from glocal.canvas import Layout

Branch = Literal["both", "cond", "uncond"]
Kind = Literal["self", "cross", "joint"]


@dataclass(frozen=True)
class Site:
    """One attention of a model, known before it is called.

    name: unique within its component (the module path). component: which model of a pipeline ("transformer").
    layer: position in the stack. kind: "self", "cross" or "joint" (text and media in one sequence).
    heads, kv_heads, head_dim: sizes. causal, scale (None: head_dim ** -0.5), softcap, sliding_window: of the host.
    rotary: how positions enter, in the host's words; q and k arrive rotated.
    """

    name: str
    layer: int
    heads: int
    head_dim: int
    component: str = "transformer"
    kind: Kind = "self"
    kv_heads: int | None = None
    causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    sliding_window: int | None = None
    rotary: str = "none"


@dataclass(frozen=True, eq=False)
class Block:
    """A module without attention of its own at which methods may act: `Method.blocks` asks for them.

    name: path in its component. role: "down", "mid", "up" (stages of a UNet), "resnet", "downsampler", "upsampler",
    "transformer" (the transformer blocks between two of them), "layer" (a transformer block). module: the module, for
    what its forward is made of.
    """

    name: str
    role: str
    module: nn.Module
    component: str = "transformer"


@dataclass
class RunState:
    """Where the model is in its run; the host keeps it up to date.

    step counts executed steps (several forwards of guidance are one step); total: steps of the run, None if unknown.
    timestep: the noise level in [0, 1] (1 is pure noise) of a generator, else the host's own number.
    rows: (sample, guidance branch) of every row of the batch. expert: name of the active sub-model.
    call: forwards of this step before this one. branches: guidance branches seen in this step.
    forward: the host's own record of the forward that runs, or ran last.
    store: whatever methods remember, keyed (site name, own name); it is cleared when a run starts.
    """

    step: int = -1
    total: int | None = None
    timestep: float | None = None
    phase: Literal["denoise", "prefill", "decode"] = "denoise"
    rows: tuple[tuple[int, Branch], ...] = ()
    expert: str | None = None
    call: int = 0
    branches: set[Branch] = field(default_factory=set)
    forward: Any = field(default=None, repr=False)
    store: dict[tuple[str, Hashable], Any] = field(default_factory=dict)

    @property
    def branch(self) -> Branch:
        """The guidance branch that all rows share, else "both"."""
        branches: set[Branch] = {branch for _, branch in self.rows}
        return branches.pop() if len(branches) == 1 else "both"

    def begin(self, total: int | None = None) -> None:
        """A run starts: forget what the last one left."""
        self.step, self.timestep, self.total, self.call = -1, None, total, 0
        self.branches.clear()
        self.store.clear()

    def advance(self, timestep: float, branch: Branch) -> None:
        """A forward at noise level `timestep` begins, for `branch`.

        A higher level than the last one starts a run, a lower one starts a step, the same one is another call of the
        step. A branch that comes again at the first level starts a run too: the run before had one step.
        """
        again = self.step == 0 and timestep == self.timestep and branch in self.branches
        if self.timestep is None or timestep > self.timestep or again:
            self.begin(self.total)
        if timestep != self.timestep:
            self.step, self.call = self.step + 1, 0
            self.branches.clear()
        else:
            self.call += 1
        self.timestep = timestep
        self.branches.add(branch)


@dataclass(frozen=True, eq=False)
class SiteCall:
    """One call of one site.

    layout: where the tokens lie in this call. state: the running state. residual [B, N, C]: the stream before the
    attention is added, if the host shows it. contribution: maps per-head outputs [B, H, M, D] (M rows of the call, any
    choice) to what each adds to the residual stream [B, H, M, C]; None if the host cannot say. native: the host's own
    record of the call. row: the row of the batch that this call serves, where the host calls once a sample; None: all.
    factor: where a norm stands behind the output projection, maps the outputs of all heads [B, H, M, D] to the factor
    [B, M] by which it scales those contributions; None for one.
    heads: numbers of the query heads that are handed on; None: all.
    """

    site: Site
    layout: Layout
    state: RunState
    residual: Tensor | None = None
    contribution: Callable[[Tensor], Tensor] | None = None
    native: Any = None
    row: int | None = None
    factor: Callable[[Tensor], Tensor] | None = None
    heads: tuple[int, ...] | None = None


# q, k, v [B, H, N, D] -> out [B, H, N, D]; a method may hand on some of the heads only.
Core = Callable[[Tensor, Tensor, Tensor, SiteCall], Tensor]
