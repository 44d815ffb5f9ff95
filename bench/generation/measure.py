"""One case: build, check every method against the definition, then run dense and sparse forwards in turn."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from generation.cases import Case
from generation.entries import Entry, Where
from generation.models import Inputs, made_on
from generation.timing import LONG, Clock, Dense, alone, dense_times, kernels, seconds, timed_blocks, told
from glocal.adapt import Method, attach, fused_norms
from glocal.adapt.scale_dit import ScaleDiT
from glocal.adapt.sparse import Ran, SparseMethod

FLASH = "dense, FlashAttention-2"  # what most of the papers compare with
FUSED = "dense, fused norms"
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Options:
    """How a case is run. warm: one forward of each method and no clock, so that kernels are compiled. seconds: no
    further round of a case after so many. patience: seconds that a check or the clocks of a forward may take; a kernel
    that never ends would hold the process, so then it says where it stands and ends.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int = 3
    warm: bool = False
    seconds: float = 3600.0
    patience: float | None = None

    @contextmanager
    def waits(self) -> Iterator[None]:
        """While the context lasts, the process ends after `patience`."""
        if self.patience is not None:
            faulthandler.dump_traceback_later(self.patience, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


@dataclass
class Times:
    """Seconds, one entry a round. step: of a forward, by the wall clock. attention: of one call, mean. blocks: of one
    block of each stack, mean. rest: of a forward without its blocks. kernels: of a forward, the sum of its kernels;
    of UNets alone, whose forwards wait for the host.
    """

    step: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    blocks: list[tuple[float, ...]] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    kernels: list[float] = field(default_factory=list)


@dataclass
class Contender:
    """A method of the case, or dense attention (no entry, no method). kernel: of what is dense; None is the fastest.
    fused: with fused norms. pairs: of queries and keys that attention is given in a forward.
    """

    entry: Entry | None = None
    method: Method | None = None
    kernel: str | None = None
    fused: bool = False
    error: float = 0.0
    pairs: int = 0
    times: Times = field(default_factory=Times)

    @property
    def ran(self) -> list[Ran]:
        """What ran at the sites of the method; empty where nobody counts."""
        if isinstance(self.method, ScaleDiT):
            return [self.method.ran]
        return list(self.method.ran.values()) if isinstance(self.method, SparseMethod) else []

    @property
    def kept(self) -> float | None:
        """Share of the pairs of its attention calls that were used; None where nobody counts."""
        ran = self.ran
        return sum(r.kept for r in ran) / len(ran) if ran else 1.0 if self.method is None else None


class Bench:
    """A model of a case, and its forwards."""

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.device, self.dtype = case, options.device, options.dtype
        torch.manual_seed(0)
        with made_on(self.device, self.dtype):
            self.model: nn.Module = case.kind.build(case.layers, case.width).eval()
        self.dense = dense_times(case.kind, case.attended, self.device, self.dtype)
        print(f"  dense, ms a call: {told(self.dense)}", flush=True)
        self.kernel = next(iter(self.dense))
        self.given = case.kind.inputs(case.grid, self.device, self.dtype)

    def at(self, *, small: bool = False, backend: str = "auto") -> Where:
        """What methods are made for."""
        case = self.case
        small = small or case.small
        return Where(case.kind, case.checked if small else case.grid, sum(case.layers), case.width, backend, small)

    @contextmanager
    def held(self, method: Method | None, kernel: str, fused: bool = False) -> Iterator[None]:
        """The model with a dense kernel inside and the method around it."""
        with fused_norms(self.model) if fused else nullcontext(), attach(self.model, Dense(kernel)):
            if method is None:
                yield
                return
            with attach(self.model, method) as handle:
                handle.state.total = self.case.steps
                yield

    @contextmanager
    def only(self, method: Method | None) -> Iterator[None]:
        """The model with nothing but the method in it."""
        with nullcontext() if method is None else attach(self.model, method) as handle:
            if handle is not None:
                handle.state.total = self.case.steps
            yield

    def forward(self, given: Inputs) -> torch.Tensor:
        """One forward."""
        with torch.no_grad():
            return self.model(**given, return_dict=False)[0]

    def check(self, entry: Entry) -> float:
        """Relative difference of the output to that by the definition, with norms as the model has them, at a small
        size of the same method.
        """
        found = []
        given = self.case.kind.inputs(self.at(small=True).grid, self.device, self.dtype)
        for backend, kernel, fused in (("auto", self.kernel, entry.fused), ("reference", "dense", False)):
            with self.held(entry.make(self.model, self.at(small=True, backend=backend)), kernel, fused):
                found.append(self.forward(given).float())
        return float((found[0] - found[1]).norm() / found[1].norm())

    def run(self, contender: Contender, *, keep: bool) -> None:
        """One forward by all clocks, kept or not."""
        clock, times = Clock(self.device), contender.times
        kernel = self.kernel if contender.kernel is None else contender.kernel
        with self.held(contender.method, kernel, contender.fused), attach(self.model, clock):
            with timed_blocks(self.model, self.case.kind.stacks, self.device) as marks:
                took = seconds(lambda: self.forward(self.given), self.device)
        if not marks:  # a UNet waits for the host at its many small calls, so nothing but the method may stand in it
            with self.only(contender.method), alone(kernel):
                took = seconds(lambda: self.forward(self.given), self.device)
                if keep:
                    busy = kernels(lambda: self.forward(self.given), self.device)
                    times.kernels.append(sum(t for t, _ in busy) / 1e6)
        blocks = [mark.read() for mark in marks.values()]
        calls, contender.pairs = clock.marks.read(), clock.pairs
        if keep:
            times.step.append(took)
            times.attention.append(sum(calls) / len(calls) if calls else float("nan"))
            times.blocks.append(tuple(sum(b) / len(b) for b in blocks))
            times.rest.append(took - sum(map(sum, blocks)))

    def profile(self, contender: Contender) -> str:
        """Where the time of a forward goes, by kernel."""
        kernel = self.kernel if contender.kernel is None else contender.kernel
        with self.held(contender.method, kernel, contender.fused):
            each = kernels(lambda: self.forward(self.given), self.device)
        longest = sorted(each, key=lambda entry: -entry[0])[:24]
        return "\n".join(f"  {t / 1e3:9.3f} ms {e.count:5d} x {e.key[:100]}" for t, e in longest)


@dataclass
class Measured:
    """What a case gave, by name, "dense" first. wrong: methods whose check failed."""

    case: Case
    bench: Bench
    contenders: dict[str, Contender]
    wrong: list[str]

    def profiles(self, part: str) -> Iterator[str]:
        """Where the time of a forward goes, of every contender whose name contains `part`."""
        for name, contender in self.contenders.items():
            if part in name:
                yield f"{self.case.name}: {name}\n{self.bench.profile(contender)}"


def measure(case: Case, options: Options) -> Iterator[Measured]:
    """All methods of a case, after every round anew. One that cannot run, or is wrong, is reported and left out."""
    begin = time.perf_counter()
    bench = Bench(case, options)
    contenders: dict[str, Contender] = {"dense": Contender()}
    wrong: list[str] = []
    for entry in case.entries:
        try:
            with options.waits():
                error = bench.check(entry)
            made = entry.make(bench.model, bench.at())
        except Exception as problem:  # whatever a method's kernels raise, the others are measured
            print(f"{case.name}: {entry.name}: {type(problem).__name__}: {str(problem)[:400]}", flush=True)
            continue
        if not error <= TOLERANCE[options.dtype]:
            wrong.append(entry.name)
            worst = f"more than {TOLERANCE[options.dtype]:.0e}"
            print(f"{case.name}: {entry.name}: output is off by {error:.2e}, {worst}", file=sys.stderr, flush=True)
            continue
        contenders[entry.name] = Contender(entry, made, fused=entry.fused, error=error)
        print(f"  {entry.name}: checked, {time.perf_counter() - begin:.0f} s since the case began", flush=True)
    if any(c.fused for c in contenders.values()):
        contenders[FUSED] = Contender(fused=True)
    rounds = 0 if options.warm else options.rounds if case.rounds is None else min(case.rounds, options.rounds)
    if bench.kernel != "sdpa flash" and options.device.type == "cuda" and case.tokens < LONG and not options.warm:
        contenders[FLASH] = Contender(kernel="sdpa flash")
    for turn in range(rounds + 1):  # the first one plans and compiles
        if turn > 1 and time.perf_counter() - begin > options.seconds:
            break
        print(f"  round {turn}: {time.perf_counter() - begin:.0f} s since the case began", flush=True)
        for name, contender in list(contenders.items()):
            try:
                with options.waits():
                    bench.run(contender, keep=turn > 0)
                print(f"    {name}: {contender.times.step[-1:]} s", flush=True)
            except Exception as problem:
                if contender.entry is None and contender.kernel is None:
                    raise  # nothing can be held against it
                print(f"{case.name}: {name}: {type(problem).__name__}: {str(problem)[:400]}", flush=True)
                del contenders[name]
        yield Measured(case, bench, contenders, wrong)
