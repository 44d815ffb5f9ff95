"""What one run of `advise` returns, and what its stages share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from glocal._progress import Progress
from glocal.advise.calibrate import LayerGains
from glocal.advise.confirm import Confirmed
from glocal.advise.dropped import Dropped
from glocal.advise.effort import AdviseOptions, Effort, Target
from glocal.advise.farm import Farm
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Objective
from glocal.advise.preflight import Preflight
from glocal.advise.probe import ProbeRecord, Shrunk
from glocal.advise.proof import Attempt
from glocal.advise.recipe import Recipe
from glocal.advise.search import Rung
from glocal.advise.state import State
from glocal.advise.timing import Times
from glocal.advise.validation import Validation
from glocal.advise.weights import Weights

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Advice:
    """What `advise` found. Every number it holds was measured in this run or is named predicted.

    status: "validated" (at least 8 pairs accepted), "candidate" (accepted with fewer), "dense". reason: one sentence.
    rejected: recipes that failed validation before the chosen one was tried. stages: seconds spent by stage.
    layers: how far the errors of a layer add up, over the mean; predictions count by it. shrunk: where the probe had to
    do with less memory. confirmed: the distinct calls of the chosen recipe, forecast and timed.
    """

    recipe: Recipe
    status: Literal["validated", "candidate", "dense"]
    reason: str
    effort: Effort
    target: Target
    preflight: Preflight
    times: Times
    records: tuple[ProbeRecord, ...]
    dropped: Mapping[str, str]
    methods: Mapping[str, MethodSpec]
    weights: Weights | None = None
    layers: LayerGains = field(default_factory=dict)
    ladder: tuple[Rung, ...] = ()
    chosen: Rung | None = None
    anchors: tuple[float, float] | None = None
    validation: Validation | None = None
    rejected: tuple[Attempt, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    shrunk: tuple[Shrunk, ...] = ()
    confirmed: Confirmed | None = None

    @property
    def accepted(self) -> bool:
        """Whether the recipe met every limit."""
        return self.status != "dense"


@dataclass
class Run:
    """What the stages share."""

    model: Any
    objective: Objective
    effort: Effort
    target: Target
    options: AdviseOptions
    progress: Progress
    state: State
    farm: Farm
    stages: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    name: str | None = None
    dropped: Dropped = field(default_factory=Dropped)

    def stage(self, name: str | None, steps: int | None = None) -> None:
        """End the running stage and begin another."""
        now = time.monotonic()
        if self.name is not None:
            self.stages[self.name] = now - self.began
        self.name, self.began = name, now
        if name is None:
            self.progress.close()
        else:
            self.progress.stage(name, steps)

    def once(self, name: str, function: Callable[..., T], *args: Any) -> T:
        """One part that runs here, whatever the number of processes: ``function(model, objective, *args)``."""
        return self.state.once(name, lambda: function(self.model, self.objective, *args))
