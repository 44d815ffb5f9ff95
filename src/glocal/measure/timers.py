"""Time of calls: one call with its spread, and contenders interleaved in one process for paired ratios.

Times are seconds: CUDA events on a GPU, `time.perf_counter` elsewhere. On a GPU a call is queued while the device still
waits, so that its time is what the device spends; what the host spends on it stands beside, in `host`. The level-2
cache can be flushed before each call, as the next layer of a model would find it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median and the 5th and 95th percentile (`low`, `high`) of `samples`, in `unit`.

    host: on a GPU the median time until the call returned, which a device that is not kept busy otherwise waits for;
    None where the samples are times of the host.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]
    unit: str = "s"
    host: float | None = None


@dataclass(frozen=True)
class Ratio:
    """baseline time / contender time: above 1 the contender is faster.

    of_medians: ratio of the two medians. median, low, high: of the ratios of single rounds; [low, high] are order
    statistics that hold the true median with probability `level` whatever the distribution (under 5 rounds no pair of
    order statistics reaches 90 %, so `level` says what the extremes give).
    """

    of_medians: float
    median: float
    low: float
    high: float
    level: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class PairedTiming:
    """Times of all contenders from interleaved rounds, and their speed-up over `baseline`."""

    baseline: str
    times: dict[str, Timing]
    ratios: dict[str, Ratio]

    def against(self, baseline: str) -> PairedTiming:
        """The same rounds with the speed-ups over another contender."""
        if baseline not in self.times:
            raise ValueError(f"baseline {baseline!r} is no contender; legal: {', '.join(self.times)}")
        base = self.times[baseline]
        ratios = {name: _ratio(base, time, 0.90) for name, time in self.times.items() if name != baseline}
        return PairedTiming(baseline, self.times, ratios)


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summarize(samples: Sequence[float], unit: str = "s", host: Sequence[float] = ()) -> Timing:
    """Timing record of raw samples (at least one). host: times of the host for the same calls, if they are others."""
    if not samples:
        raise ValueError("samples is empty; a timing needs at least 1 sample")
    ordered = sorted(float(sample) for sample in samples)
    return Timing(
        median=_quantile(ordered, 0.5),
        low=_quantile(ordered, 0.05),
        high=_quantile(ordered, 0.95),
        samples=tuple(float(sample) for sample in samples),
        unit=unit,
        host=_quantile(sorted(host), 0.5) if host else None,
    )


_LONGEST_WAIT = 0.25  # seconds the device is held back at most


class _Stopwatch:
    """Times calls on one device; holds the buffer whose rewriting empties the level-2 cache."""

    def __init__(self, device: torch.device | str, flush: bool) -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {str(device)!r}; timers know 'cpu' and 'cuda'")
        self.cuda = self.device.type == "cuda"
        if flush and not self.cuda:
            raise ValueError(f"flush=True needs a cuda device, got {str(device)!r}; pass flush=False")
        self.buffer: torch.Tensor | None = None
        self.cycles = 0.0  # of the device a second
        if flush:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.buffer = torch.empty(2 * cache, dtype=torch.int8, device=self.device)
        if self.cuda:
            with torch.cuda.device(self.device):
                spent = [self.events(lambda: torch.cuda._sleep(1 << 20))[0] for _ in range(3)]
            self.cycles = (1 << 20) / min(spent)

    def events(self, fn: Callable[[], object], wait: float = 0.0) -> tuple[float, float]:
        """Seconds of the device between two events around `fn`, after a wait of the device, and seconds of the host."""
        if self.buffer is not None:
            self.buffer.zero_()
        if wait > 0:
            torch.cuda._sleep(int(wait * self.cycles))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        start = time.perf_counter()
        fn()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000.0, host  # events count milliseconds


class _Contender:
    """A call under a stopwatch: warmed up, then timed as often as wanted."""

    def __init__(self, watch: _Stopwatch, fn: Callable[[], object], warmup: int) -> None:
        self.watch, self.fn = watch, fn
        self.samples: list[float] = []
        self.host: list[float] = []
        self.wait = 0.0
        self.waits_itself = False
        if not watch.cuda:
            for _ in range(warmup):
                fn()
            return
        with torch.cuda.device(watch.device):
            for _ in range(max(warmup, 2)):  # the first one may compile; the last says how long the host takes
                torch.cuda.synchronize()
                host = watch.events(fn)[1]
        self.wait = min(1.5 * host + 5e-5, _LONGEST_WAIT)

    def call(self) -> None:
        """Add one sample."""
        if not self.watch.cuda:
            start = time.perf_counter()
            self.fn()
            self.samples.append(time.perf_counter() - start)
            return
        with torch.cuda.device(self.watch.device):
            device, host = self.watch.events(self.fn, self.wait)
            for _ in range(2):
                if host < self.wait or self.waits_itself:
                    break
                self.wait = min(2 * self.wait, _LONGEST_WAIT)  # the device ran dry meanwhile: once more, held longer
                device, host = self.watch.events(self.fn, self.wait)
            if host >= self.wait and not self.waits_itself:  # it waits for the device, or fills its queue
                self.wait, self.waits_itself = 0.0, True
                device, host = self.watch.events(self.fn)
        self.samples.append(device)
        self.host.append(host)

    def timing(self) -> Timing:
        """All samples."""
        return summarize(self.samples, host=self.host)


def time_call(
    fn: Callable[[], object],
    *,
    device: torch.device | str,
    warmup: int = 3,
    repeats: int = 20,
    flush: bool = False,
) -> Timing:
    """Time `fn()` `repeats` times after `warmup` untimed calls (on a GPU at least 2).

    On a GPU the time is the device's alone, unless `fn` waits for the device or fills its queue; `host` says what the
        host takes.
    flush (cuda): empty the level-2 cache before each.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, got repeats={repeats!r}, warmup={warmup!r}")
    contender = _Contender(_Stopwatch(device, flush), fn, warmup)
    for _ in range(repeats):
        contender.call()
    return contender.timing()


def median_ranks(n: int, level: float) -> tuple[int, float]:
    """Largest r such that [r-th smallest, r-th largest] (r from 0) of n samples holds the median with chance >= level.

    Returns r and that chance: 1 - 2 P(binomial(n, 1/2) <= r), whatever the distribution. Where even the extremes fall
    short of `level`, r is 0 and the chance is theirs.
    """
    place, below = 0, 1
    while place + 1 <= (n - 1) // 2:
        following = below + math.comb(n, place + 1)
        if 1.0 - 2.0 * (following / 2**n) < level:
            break
        place, below = place + 1, following
    return place, 1.0 - 2.0 * (below / 2**n)


def _ratio(above: Timing, below: Timing, level: float) -> Ratio:
    rounds = tuple(a / b for a, b in zip(above.samples, below.samples, strict=True))
    ordered = sorted(rounds)
    place, reached = median_ranks(len(ordered), level)
    return Ratio(
        of_medians=above.median / below.median,
        median=_quantile(ordered, 0.5),
        low=ordered[place],
        high=ordered[-1 - place],
        level=reached,
        rounds=rounds,
    )


def compare_paired(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    *,
    baseline: str | None = None,
    warmup: int = 2,
    flush: bool = False,
) -> PairedTiming:
    """Time all contenders once in each of `rounds` rounds, so that drift of clocks and load hits them alike.

    As in `time_call`, a GPU's time is the device's alone.

    generator draws a fresh random order for each round; without one the order alternates forward and backward.
    baseline: a name in `contenders` (default: the first); ratios are baseline time / contender time.
    """
    names = list(contenders)
    if len(names) < 2:
        raise ValueError(f"contenders holds {len(names)} name(s); a comparison needs at least 2")
    if rounds < 2 or warmup < 0:
        raise ValueError(f"rounds must be >= 2 and warmup >= 0, got rounds={rounds!r}, warmup={warmup!r}")
    base = names[0] if baseline is None else baseline
    if base not in contenders:
        raise ValueError(f"baseline {base!r} is no contender; legal: {', '.join(names)}")
    watch = _Stopwatch(device, flush)
    timed = {name: _Contender(watch, contenders[name], warmup) for name in names}
    for index in range(rounds):
        order = names if index % 2 == 0 else names[::-1]
        if generator is not None:
            order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        for name in order:
            timed[name].call()
    times = {name: timed[name].timing() for name in names}
    ratios = {name: _ratio(times[base], times[name], 0.90) for name in names if name != base}
    return PairedTiming(baseline=base, times=times, ratios=ratios)
