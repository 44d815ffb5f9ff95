"""Before anything is changed: does the model reproduce itself, does a dense plan reproduce the model, does undo restore
it bit for bit, and how much of a forward is attention at all?
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal._errors import GlocalError
from glocal.adapt.attach import Method, attach
from glocal.adapt.host import host_of
from glocal.adapt.records import Core, Site, SiteCall
from glocal.advise.apply import RecipeMethod
from glocal.advise.objective import Latents, Output
from glocal.advise.recipe import Recipe
from glocal.advise.workload import Sample


class AdviceError(GlocalError, RuntimeError):
    """Advice that cannot go on (the model does not reproduce itself, say); the message says what to mend."""


@dataclass(frozen=True)
class Preflight:
    """sites: all attention sites. shape: grid of the tokens at the first site. tokens: keys of a call.
    attention: seconds of attention in one forward, forward: seconds of it all (medians). share: their ratio.
    ceiling: speed-up of a forward if attention cost nothing (Amdahl). memory: peak bytes of a forward: of the device,
    on a CPU of the whole process; None where the system does not say. output: bytes of one result, frames included.
    """

    sites: tuple[Site, ...]
    shape: tuple[int, ...]
    tokens: int
    attention: float
    forward: float
    memory: int | None = None
    output: int = 0

    @property
    def share(self) -> float:
        """Attention's share of a forward."""
        return min(self.attention / self.forward, 1.0)

    @property
    def ceiling(self) -> float:
        """Largest possible speed-up of a forward."""
        return 1 / max(1 - self.share, 1e-9)


class Stopwatch(Method):
    """Times every call of the attention of a site."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.shape: tuple[int, ...] = ()
        self.tokens = 0

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """The site's own attention, timed."""
        synchronise(q)
        began = time.perf_counter()
        out = inner(q, k, v, call)
        synchronise(q)
        self.seconds += time.perf_counter() - began
        self.shape, self.tokens = call.layout.kv.grid.axes, call.layout.nk
        return out


class Inside(Method):
    """Calls ``look(q, k, v, call)`` once, inside the first call of `site` at executed step `step`."""

    def __init__(self, site: str, step: int, look: Callable[[Tensor, Tensor, Tensor, SiteCall], None]) -> None:
        self.site, self.step_number, self.look = site, step, look
        self.done = False

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """The site's own attention, after the look."""
        if not self.done and call.site.name == self.site and call.state.step == self.step_number:
            self.done = True
            self.look(q, k, v, call)
        return inner(q, k, v, call)


def synchronise(tensor: Tensor) -> None:
    """Wait for the device of `tensor`."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def preflight(model: Any, sample: Sample, objective: Latents) -> Preflight:
    """Run the last step of `sample` a few times and compare. AdviceError where the model or the host misbehaves."""
    host = host_of(model)
    sites = tuple(s for s in host.sites(model) if s.kind != "cross")
    if not sites:
        raise AdviceError(f"{type(model).__name__} has no attention site that its host adapter knows.")
    last = len(objective.levels) - 2
    latent = objective.first_latent(model, sample)

    def once() -> Tensor:
        return objective.run(model, sample, start=last, latent=latent if last else None).tensor

    result = objective.run(model, sample, start=last, latent=latent if last else None)
    plain = result.tensor
    if not torch.equal(plain, once()):
        raise AdviceError(
            "The model does not reproduce itself: the same sample and seed gave two outputs. Switch to evaluation mode "
            "and deterministic kernels, then run again."
        )
    with attach(model, RecipeMethod(Recipe("dense"))):
        through = once()
    if not torch.equal(plain, through):
        raise AdviceError(
            f"A dense plan through the host of {type(model).__name__} does not reproduce the model "
            f"(largest difference {float((plain - through).abs().max()):.3g}); the host adapter is at fault."
        )
    watch, total, inside = Stopwatch(), [], []
    for _ in range(2):
        watch.seconds = 0.0
        with attach(model, watch):
            began = time.perf_counter()
            once()
            total.append(time.perf_counter() - began)
        inside.append(watch.seconds)
    if not torch.equal(plain, once()):
        raise AdviceError("Undo did not restore the model bit for bit; the host adapter is at fault.")
    memory = peak_memory(latent)
    return Preflight(sites, watch.shape, watch.tokens, min(inside), min(total), memory, _size(result))


def peak_memory(tensor: Tensor) -> int | None:
    """Most bytes held so far: on the device of `tensor`, on a CPU by the process; None where nobody counts them."""
    if tensor.is_cuda:
        return torch.cuda.max_memory_allocated(tensor.device)
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _size(output: Output) -> int:
    parts = (output.tensor, output.frames)
    return sum(t.numel() * t.element_size() for t in parts if t is not None)
