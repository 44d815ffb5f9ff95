"""Before anything is changed: does the model reproduce itself, does a dense plan reproduce the model, does undo restore
it bit for bit, does the host know all of its attention, and how much of a forward is attention at all?
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glocal._errors import GlocalError
from glocal.adapt.attach import Method, attach, media_sites, sites_of
from glocal.adapt.records import Core, Site, SiteCall
from glocal.advise.apply import RecipeMethod
from glocal.advise.objective import Objective, Output
from glocal.advise.recipe import Recipe
from glocal.advise.workload import Sample
from glocal.canvas import Layout

MOST_UNKNOWN = 0.05  # share of the attention time that sites the host does not know may take


class AdviceError(GlocalError, RuntimeError):
    """Advice that cannot go on (the model does not reproduce itself, say); the message says what to mend."""


@dataclass(frozen=True)
class Place:
    """Where the tokens of a call lie: axis lengths of the one grid, tokens before and behind it, valid text tokens
    (least and most over the samples), and tokens in all.
    """

    shape: tuple[int, ...]
    before: int
    after: int
    tokens: int
    valid: tuple[int, int] | None = None

    @staticmethod
    def of(layout: Layout) -> Place | None:
        """Of the keys of a layout; None where it has no grid, or several."""
        grids = [part for part in layout.kv.parts if part.is_grid]
        if len(grids) != 1 or len(layout.kv.grids) != 1:
            return None
        first = int(layout.kv.indices(grids[0].name)[0])
        rest = layout.kv.size - first - grids[0].tokens
        valid = None
        if layout.lengths:
            lengths = next(iter(layout.lengths.values()))
            valid = (int(lengths.min()), int(lengths.max()))
        return Place(tuple(layout.kv.grid.axes), first, rest, layout.nk, valid)


@dataclass(frozen=True)
class Preflight:
    """sites: all self and joint attention sites. shape: grid of the tokens at the first site. tokens: keys of a call.
    attention: seconds of attention in one step, forward: seconds of it all (medians). share: their ratio.
    ceiling: speed-up of a forward if attention cost nothing (Amdahl). memory: peak bytes of a forward: of the device,
    on a CPU of the whole process; None where the system does not say. output: bytes of one result, frames included.
    unknown: share of the attention time outside the sites the host knows. measures: names of the objective's measures.
    """

    sites: tuple[Site, ...]
    shape: tuple[int, ...]
    tokens: int
    attention: float
    forward: float
    memory: int | None = None
    output: int = 0
    unknown: float = 0.0
    levels: tuple[float, ...] = (1.0, 0.0)
    measures: tuple[str, ...] = ()
    place: Place | None = None

    @property
    def share(self) -> float:
        """Attention's share of a forward."""
        return min(self.attention / self.forward, 1.0)

    @property
    def ceiling(self) -> float:
        """Largest possible speed-up of a forward."""
        return 1 / max(1 - self.share, 1e-9)

    @property
    def causal(self) -> bool:
        """Whether the sites see no later token."""
        return self.sites[0].causal


class Stopwatch(Method):
    """Times every call of the attention of a self or joint site, and knows when any known site is at work."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.place: Place | None = None
        self.busy = 0

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """All of them, as cross attention is known too."""
        return sites

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """The site's own attention, timed."""
        self.busy += 1
        try:
            if call.site.kind == "cross" or call.site.sliding_window is not None:
                return inner(q, k, v, call)
            synchronise(q)
            began = time.perf_counter()
            out = inner(q, k, v, call)
            synchronise(q)
            self.seconds += time.perf_counter() - began
        finally:
            self.busy -= 1
        self.place = Place.of(call.layout)
        return out


class _Outside(TorchFunctionMode):
    """Seconds of scaled_dot_product_attention outside the sites a stopwatch knows."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch, self.seconds = watch, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {} if kwargs is None else kwargs
        if func is not F.scaled_dot_product_attention or self.watch.busy:
            return func(*args, **given)
        synchronise(args[0])
        began = time.perf_counter()
        out = func(*args, **given)
        synchronise(args[0])
        self.seconds += time.perf_counter() - began
        return out


class Inside(Method):
    """Calls ``look(q, k, v, call, inner)`` once, inside the first call of `site`; inner is the site's own attention."""

    def __init__(self, site: str, look: Callable[[Tensor, Tensor, Tensor, SiteCall, Core], None]) -> None:
        self.site, self.look = site, look
        self.done = False

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The one site."""
        return tuple(s for s in sites if s.name == self.site)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """The site's own attention, after the look."""
        if not self.done:
            self.done = True
            self.look(q, k, v, call, inner)
        return inner(q, k, v, call)


def synchronise(tensor: Tensor) -> None:
    """Wait for the device of `tensor`."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def preflight(model: Any, sample: Sample, objective: Objective) -> Preflight:
    """Run one step of `sample` a few times and compare. AdviceError where the model or the host misbehaves."""
    sites = media_sites(sites_of(model))
    if not sites:
        raise AdviceError(f"{type(model).__name__} has no attention site that its host adapter knows.")

    def once() -> Tensor:
        return objective.brief(model, sample).tensor

    result = objective.brief(model, sample)
    plain = result.tensor
    if not torch.equal(plain, once()):
        raise AdviceError(
            f"The model does not reproduce itself: the same sample and seed gave two outputs{_culprit(once)}. Switch "
            "to evaluation mode and deterministic kernels, then run again."
        )
    with attach(model, RecipeMethod(Recipe("dense"))):
        through = once()
    if not torch.equal(plain, through):
        raise AdviceError(
            f"A dense plan through the host of {type(model).__name__} does not reproduce the model "
            f"(largest difference {float((plain - through).abs().max()):.3g}); the host adapter is at fault."
        )
    watch, total, inside, outside = Stopwatch(), [], [], []
    for _ in range(2):
        watch.seconds = 0.0
        with attach(model, watch), _Outside(watch) as other:
            began = time.perf_counter()
            once()
            total.append(time.perf_counter() - began)
        inside.append(watch.seconds)
        outside.append(other.seconds)
    if not torch.equal(plain, once()):
        raise AdviceError("Undo did not restore the model bit for bit; the host adapter is at fault.")
    unknown = min(outside) / max(min(outside) + min(inside), 1e-12)
    if unknown > MOST_UNKNOWN:
        raise AdviceError(
            f"Attention that the host of {type(model).__name__} does not know takes {unknown:.0%} of the attention "
            f"time (legal: {MOST_UNKNOWN:.0%}); teach it those sites with glocal.adapt.register_host or "
            "glocal.adapt.site."
        )
    if watch.place is None:
        raise AdviceError(
            f"The tokens of {type(model).__name__} lie on several grids, or on none; methods need one. Run it without "
            "reference images, say."
        )
    measures = tuple(objective.distance(result, result))
    return Preflight(
        sites,
        watch.place.shape,
        watch.place.tokens,
        min(inside),
        min(total),
        peak_memory(plain),
        _size(result),
        unknown,
        tuple(objective.levels_of(model, sample)),
        measures,
        watch.place,
    )


class _Trace(TorchDispatchMode):
    """Hashes of what every operator returned, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **({} if kwargs is None else kwargs))
        found = hashlib.sha256()
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.numel():
                found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.seen.append((str(func), found.hexdigest()))
        return out


def _culprit(once: Callable[[], Tensor]) -> str:
    """The first operator that gives two results, in words; nothing where two more runs agree."""
    runs = []
    for _ in range(2):
        with _Trace() as trace:
            once()
        runs.append(trace.seen)
    for first, second in zip(*runs, strict=False):
        if first != second:
            return f" (the first operator to differ is {first[0]})"
    return ""


def peak_memory(tensor: Tensor) -> int | None:
    """Most bytes held so far: on the device of `tensor`, on a CPU by the process; None where nobody counts them."""
    if tensor.is_cuda:
        return torch.cuda.max_memory_allocated(tensor.device)
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def whole_memory(tensor: Tensor) -> int | None:
    """Bytes that there are: on the device of `tensor`, or in the machine; None where nobody says."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _size(output: Output) -> int:
    parts = (output.tensor, output.frames)
    return sum(t.numel() * t.element_size() for t in parts if t is not None)
