"""Methods timed inside a real call, interleaved with dense; `advise.modelled` forecasts where there are many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from glocal.adapt.records import Core, Site, SiteCall
from glocal.advise.apply import RecipeMethod
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Fallback, Recipe, Rule
from glocal.measure.timers import Timing, compare_paired
from glocal.ops import Score, attend
from glocal.patterns import Causal
from glocal.plan.blockplan import BlockPlan
from glocal.plan.cost import imbalance
from glocal.plan.time_model import TimeModel, TimeSample, fit_time_model

_MIXED = "several methods in one call"


@dataclass(frozen=True, eq=False)
class Ready:
    """A method that ran on the call once: its plan there, and the kernel that was picked."""

    method: MethodSpec
    plan: BlockPlan
    kernel: str


@dataclass(frozen=True)
class MethodTime:
    """One method at one call of all heads, in seconds: median and spread, and the blocks it visits (a head's mean).

    rounds: how often it was timed; 0 for a forecast. uneven: full and partial blocks that uneven rows cost beside.
    """

    method: str
    median: float
    low: float
    high: float
    rounds: int
    full: float
    partial: float
    kept: float
    visited: float
    kernel: str
    uneven: float = 0.0


@dataclass(frozen=True)
class Checked:
    """A plan whose time was forecast and then measured, in seconds."""

    name: str
    forecast: float
    measured: float


@dataclass(frozen=True)
class Times:
    """dense: the best dense kernel present. methods: timed ones, or forecast ones (`MethodTime.rounds`). model: fit
    over timed calls, None with too few. trusted: whether the fit met plans outside it within 10 %; if not, only
    measured times are used. split: seconds that every further method costs in one call whose heads run several.
    checks: plans that the model of many candidates was held against.
    """

    dense: MethodTime
    methods: Mapping[str, MethodTime]
    model: TimeModel | None
    split: float = 0.0
    checks: tuple[Checked, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether forecasts may stand in for measurements."""
        return self.model is not None and self.model.trusted

    def ratio(self, method: str) -> float:
        """Time of a method over dense; "dense" is 1."""
        return 1.0 if method == "dense" else self.methods[method].median / self.dense.median


def blocks_of(plan: BlockPlan, heads: int) -> tuple[float, float]:
    """Full and partial blocks of one call of `heads` heads."""
    owner = plan.owner.long()
    full, partial = (float(lists.count.sum(-1).double()[owner].mean()) * heads for lists in (plan.full, plan.partial))
    return full, partial


def uneven_blocks(plan: BlockPlan, heads: int) -> float:
    """What uneven rows of one call of `heads` heads cost, in blocks: where a processor waits for the last row."""
    processors = torch.get_num_threads()
    if plan.device.type == "cuda":
        processors = torch.cuda.get_device_properties(plan.device).multi_processor_count
    rows = (plan.full.count + plan.partial.count)[plan.owner[0].long()].cpu()  # [H|1, blocks]
    whole = rows.expand(heads, -1) if len(rows) == 1 else rows.repeat_interleave(heads // len(rows), 0)
    return imbalance(whole.flatten().tolist(), processors) * float(whole.sum())


def sample_of(plan: BlockPlan, heads: int, seconds: float) -> TimeSample:
    """A timed call for the time model."""
    return TimeSample(*blocks_of(plan, heads), uneven_blocks(plan, heads), seconds)


def exact(q: Tensor, k: Tensor, v: Tensor, call: SiteCall, backend: str = "auto") -> tuple[Tensor, str]:
    """Dense attention of a call, without the host's own code: q [B, H, N, D], k, v [B, Hkv, N, D]; and its kernel."""
    score = Score(scale=call.site.scale, softcap=call.site.softcap)
    done = attend(q, k, v, Causal() if call.site.causal else None, canvas=call.layout, score=score, backend=backend)
    return done.out, done.picked.name


@torch.no_grad()
def time_methods(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: SiteCall,
    methods: Mapping[str, Ready],
    *,
    rounds: int = 5,
    inner: Core | None = None,
) -> Times:
    """Time dense and every method on the real q, k, v [B, H, N, D] of a call, in one interleaved comparison.

    methods: those that ran once already. inner: the host's own attention, which competes with our dense kernel; the
    faster one is "dense"; and one more contender is a call whose heads run several methods, for `split`. Planning of
    patterns is outside (plans are cached); routing of routers is inside, as it will be.
    """
    return timed_together(q, k, v, call, methods, {}, rounds=rounds, inner=inner)[0]


def timed_together(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: SiteCall,
    methods: Mapping[str, Ready],
    beside: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    inner: Core | None,
) -> tuple[Times, Mapping[str, Timing]]:
    """As `time_methods`, with further calls in the same comparison, which ran once already."""
    contenders: dict[str, Callable[[], object]] = dict(beside)
    kernels = {name: ready.kernel for name, ready in methods.items()}
    if inner is not None:
        contenders["dense: host"], kernels["dense: host"] = lambda: inner(q, k, v, call), "the host's own"
    if inner is None or not call.site.causal or call.site.softcap is not None:
        contenders["dense: ours"], kernels["dense: ours"] = lambda: exact(q, k, v, call), exact(q, k, v, call)[1]
    for name, ready in methods.items():
        contenders[name] = lambda method=ready.method: method.run(q, k, v, call)
    shares = {} if inner is None else dealt(list(methods), q.shape[1])
    if inner is not None and len(shares) > 1:
        mixed = mixture({n: methods[n].method for n in shares if n != "dense"}, shares, call.site)
        contenders[_MIXED] = lambda: mixed.core(q, k, v, call, inner)
        contenders[_MIXED]()
    if len(contenders) < 2:
        contenders["dense: again"] = next(iter(contenders.values()))
        kernels["dense: again"] = next(iter(kernels.values()))
    generator = torch.Generator().manual_seed(0)
    # Everything ran once already: the methods to see that they do, ours for its name, the host's own in the model.
    found = compare_paired(contenders, rounds=max(rounds, 2), device=q.device, generator=generator, warmup=0)
    times = {}
    for name, timing in found.times.items():
        if name == _MIXED or name in beside:
            continue
        plan = methods[name].plan if name in methods else None
        full, partial = (0.0, 0.0) if plan is None else blocks_of(plan, q.shape[1])
        times[name] = MethodTime(
            name,
            timing.median,
            timing.low,
            timing.high,
            len(timing.samples),
            full,
            partial,
            1.0 if plan is None else plan.kept,
            1.0 if plan is None else plan.visited,
            kernels[name],
            0.0 if plan is None else uneven_blocks(plan, q.shape[1]),
        )
    dense = min((times.pop(name) for name in list(times) if name.startswith("dense: ")), key=lambda t: t.median)
    kinds = {name: ready.method.kind for name, ready in methods.items()}
    samples = [TimeSample(t.full, t.partial, t.uneven, t.median) for n, t in times.items() if kinds[n] == "pattern"]
    fitted, held = samples[::2], samples[1::2]
    model = fit_time_model(fitted, held) if len(fitted) >= 4 else None
    split = 0.0
    if _MIXED in contenders:
        # A small difference of large times: of the least ones, which other load on the machine moves least.
        host = found.times["dense: host"].low  # heads that stay dense run the host's own
        parts = [len(h) / q.shape[1] * (host if n == "dense" else times[n].low) for n, h in shares.items()]
        split = max(0.0, found.times[_MIXED].low - sum(parts)) / (len(shares) - 1)
    return Times(replace(dense, method="dense"), times, model, split), found.times


def dealt(methods: Sequence[str], heads: int) -> dict[str, tuple[int, ...]]:
    """Heads of a call dealt in turn to dense and methods from all over the list, four ways at most."""
    count = min(3, len(methods), heads - 1)
    ways = ["dense", *(methods[round((i + 0.5) * len(methods) / count - 0.5)] for i in range(count))]
    return {name: tuple(range(way, heads, len(ways))) for way, name in enumerate(ways)}


def mixture(methods: Mapping[str, MethodSpec], shares: Mapping[str, tuple[int, ...]], site: Site) -> RecipeMethod:
    """A recipe that gives every method its heads at one site."""
    kind: Literal["joint", "self"] = "joint" if site.kind == "joint" else "self"
    layers = ((site.layer, site.layer),)
    rules = tuple(Rule(name, layers, shares[name], component=site.component, site=kind) for name in methods)
    return RecipeMethod(Recipe("candidate", methods, rules, fallback=Fallback(min_tokens=0)), check_canvas=False)
