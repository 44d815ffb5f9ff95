"""What is timed inside a real attention call: every candidate and the dense kernels, on the q, k, v that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from glocal._progress import Progress
from glocal.adapt.attach import attach as attach_method
from glocal.adapt.records import Core, SiteCall
from glocal.advise.dropped import Dropped, broken
from glocal.advise.methods import MethodSpec
from glocal.advise.modelled import times_of
from glocal.advise.objective import Objective
from glocal.advise.preflight import AdviceError, Inside
from glocal.advise.timing import Ready, Times
from glocal.advise.workload import Sample


@dataclass(frozen=True)
class Timed:
    """Times of the methods that ran, and which did not and why."""

    times: Times
    dropped: Dropped


def times_inside(
    model: Any,
    objective: Objective,
    sample: Sample,
    site: str,
    methods: Mapping[str, MethodSpec],
    rounds: int,
    progress: Progress,
) -> Timed:
    """Timed inside the first call of `site` in one step of `sample`; `progress` counts methods as each first runs."""
    found: list[Times] = []
    dropped = Dropped()

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> None:
        working = {}
        for name, method in methods.items():
            ready = ready_for(dropped, name, method, (q, k, v, call))
            if ready is not None:
                working[name] = ready
            progress.step()
        found.append(times_of(q, k, v, call, working, rounds=rounds, inner=inner))
        for name in working:
            if name not in found[-1].methods:
                dropped.unfit(name, "times cannot be forecast here, and it is not among the candidates that were timed")

    with attach_method(model, Inside(site, look)):
        objective.brief(model, sample)
    if not found:
        raise AdviceError(f"Site {site!r} was never called; the host adapter reports sites that do not run.")
    return Timed(found[0], dropped)


def ready_for(
    dropped: Dropped, name: str, method: MethodSpec, qkv: tuple[Tensor, Tensor, Tensor, SiteCall]
) -> Ready | None:
    """A candidate that runs on a real call and gives numbers; any other goes to `dropped`."""
    q, k, v, call = qkv
    try:
        method.plan(call.layout, q, k, call.site.scale, call)
    except ValueError as error:  # does not fit this canvas
        dropped.unfit(name, str(error))
        return None
    try:
        out, plan, kernel = method.run(q, k, v, call)
        wrong = broken(out)
    except Exception as error:  # a kernel may fail in any way; the report names it, and three such stop
        dropped.fail(name, f"{type(error).__name__}: {error}")
        return None
    if wrong is not None:
        dropped.fail(name, wrong)
        return None
    return Ready(method, plan, kernel)
