"""Peak memory of one call, as the tensor allocator sees it.

On a GPU: `torch.cuda.max_memory_allocated` around the call. On a CPU: the running sum of the allocator's events that
the torch profiler records, exact for tensors (memory that numpy or C libraries take for themselves is not seen).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PeakMemory:
    """extra: bytes at the peak of the call above what was held when it began. method: how it was counted."""

    extra: int
    method: str
    unit: str = "B"


def peak_memory(fn: Callable[[], object], *, device: torch.device | str) -> PeakMemory:
    """Peak bytes that `fn()` holds above the start, on `device` (cpu or cuda). Includes what it returns."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        fn()
        torch.cuda.synchronize(where)
        return PeakMemory(torch.cuda.max_memory_allocated(where) - before, "torch.cuda.max_memory_allocated")
    if where.type == "cpu":
        return PeakMemory(_cpu_peak(fn), "torch.profiler allocator events")
    raise ValueError(f"device is {str(device)!r}; peak_memory knows 'cpu' and 'cuda'")


def _cpu_peak(fn: Callable[[], object]) -> int:
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _no_stderr():
        profile.start()
    try:
        fn()
    finally:
        with _no_stderr():
            profile.stop()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        raise RuntimeError("the torch profiler returned no records; peak memory on the CPU cannot be counted")
    cpu = torch.profiler.DeviceType.CPU
    # The type stubs of torch leave out `nbytes`, which every record of the allocator has.
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    events = sorted((event for event in events if event.device_type() == cpu), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _no_stderr() -> Iterator[None]:
    """torch 2.13 writes a line past Python's stderr whenever its profiler starts or stops; nobody needs those."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
