"""What is asked of `advise`: how much is run, which target has to be met, what may be touched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glocal.advise.methods import MethodSpec, candidates

Scope = Literal["operator", "step", "end_to_end", "prefill"]


@dataclass(frozen=True)
class Effort:
    """How much is run. buckets: step ranges; blocks: query blocks probed a call; plain: methods that layers are
    measured with; budgets: attention time over dense, one ladder each; rounds: of every timing. published: settings of
    papers in the ladder. show: where no recipe meets the limit on the probe sample, validate the nearest one all the
    same, so that the page has pairs to show. rungs: recipes that may be validated, each on samples of its own; fewer
    where the workload does not hold as many. probes: samples probed; samples: those whose one-bucket runs, by an
    allocation for each budget, give the step weights. correct: once the ladder is measured, fit the step weights to it
    and allocate again. layers: groups of layers whose gains are measured at most, in `looks` step ranges. reduced: step
    weights are measured on a canvas of at most so many tokens; on a larger one gains of layers are those of one step.
    wide: the ladder is measured on the samples of the step weights too, so that one sample does not choose the recipe.
    """

    name: str
    buckets: int = 5
    blocks: int = 16
    plain: int = 2
    budgets: tuple[float, ...] = (0.75, 0.6, 0.45)
    pairs: int = 8
    rounds: int = 7
    steps_a_bucket: int = 2
    published: int = 4
    show: bool = False
    rungs: int = 3
    probes: int = 1
    samples: int = 1
    correct: bool = False
    reduced: int = 30_000
    layers: int = 8
    looks: int = 5
    wide: bool = False


EFFORTS = {
    "demonstration": Effort("demonstration", 4, 6, 1, (0.9,), 4, 5, 1, 1, show=True, rungs=1, looks=1),
    "quick": Effort("quick", pairs=2, plain=2, budgets=(0.6,), looks=2),
    "standard": Effort("standard", probes=2, correct=True),
    "thorough": Effort("thorough", pairs=19, plain=4, probes=2, samples=2, correct=True, reduced=1 << 40),
}


@dataclass(frozen=True)
class Target:
    """What is asked for: a speed-up of a scope, and limits on measures ("drift" is the mean over pairs).

    of: "prefill" is the whole run of a language objective, which is one prefill.
    """

    speedup: float | None = None
    of: Scope = "end_to_end"
    limits: Mapping[str, float] = field(default_factory=lambda: {"drift": 0.10})

    def __post_init__(self) -> None:
        if self.speedup is not None and self.speedup < 1:
            raise ValueError(f"Target: speedup={self.speedup} must be at least 1.")
        if self.of not in ("operator", "step", "end_to_end", "prefill"):
            raise ValueError(f"Target: of={self.of!r}; legal: operator, step, end_to_end, prefill.")
        if self.limits.get("drift", 0.10) <= 0:
            raise ValueError(f"Target: limits['drift']={self.limits['drift']} must be positive.")


@dataclass(frozen=True)
class AdviseOptions:
    """methods: system names to consider (empty: all that apply but "paro", which takes two more dense runs to calibrate
    and stands beside others). keep_dense: globs of site names never touched.
    candidates: methods to probe instead of the built-in list. budget: seconds the forecast may reach.
    sensitivity: what an error counts for: its size in the residual stream ("forward"), or what it does to the output by
    one-step gradients ("gradient", for models that fit in memory with their activations).
    canvases: arguments that say a size; the first is probed, validation samples take them in turn, so that all of them
    are proven.
    state: folder that keeps what is finished; resume: go on from it. jobs: processes; more than one needs `loader`, a
    function of a module that returns (model, objective) anew.
    """

    methods: tuple[str, ...] = ()
    keep_dense: tuple[str, ...] = ()
    candidates: tuple[MethodSpec, ...] = ()
    min_tokens: int = 1024
    budget: float | None = None
    sensitivity: Literal["forward", "gradient"] = "forward"
    state: Path | None = None
    resume: bool = False
    canvases: tuple[Mapping[str, int], ...] = ()
    jobs: int = 1
    loader: Callable[[], tuple[Any, Any]] | None = None

    def __post_init__(self) -> None:
        if self.sensitivity not in ("forward", "gradient"):
            raise ValueError(f"sensitivity={self.sensitivity!r}; legal: forward, gradient.")
        for name in ("methods", "keep_dense"):
            if isinstance(getattr(self, name), str):  # its letters would be taken one by one, and "*" is every site
                raise TypeError(f"AdviseOptions: {name}={getattr(self, name)!r}; legal: a tuple of words.")
        if not self.methods:
            return
        own = {m.system for m in self.candidates}
        everywhere = {m.system for causal in (False, True) for m in candidates((4, 4, 4), causal=causal)}
        check_methods(self.methods, (own or everywhere) | {"paro"})
        if {*self.methods} <= {"paro"} - own:
            raise ValueError("methods: 'paro' alone gives no gains of layers; name a pattern, say paro,tile_windows.")


def check_methods(names: Sequence[str], legal: Collection[str]) -> None:
    """ValueError for a system that is not legal."""
    for name in names:
        if name not in legal:
            raise ValueError(f"methods: {name!r} is no candidate here; legal: {', '.join(sorted(legal))}.")


def effort_of(effort: str | Effort) -> Effort:
    """An effort, or the built-in one of that name; ValueError lists them."""
    if isinstance(effort, Effort):
        return effort
    if effort not in EFFORTS:
        raise ValueError(f"effort={effort!r}; legal: {', '.join(EFFORTS)}.")
    return EFFORTS[effort]


def listed(options: AdviseOptions, shape: Sequence[int], *, causal: bool = False) -> list[MethodSpec]:
    """The methods to consider on a grid of axis lengths `shape`; ValueError for a system that is no candidate."""
    wanted = list(options.candidates) if options.candidates else candidates(shape, causal=causal)
    if options.methods:
        known = {m.system for m in wanted} | (set() if causal or len(shape) not in (2, 3) else {"paro"})
        check_methods(options.methods, known)
        wanted = [m for m in wanted if m.system in options.methods]
    return wanted
