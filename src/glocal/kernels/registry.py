"""Which backends exist, what each can do, and which one a call gets: a pure function of records."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, Protocol, cast

from torch import Tensor

from glocal.kernels import timing
from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Needs, Request, refusals
from glocal.kernels.timing import Visits
from glocal.plan.devices.table import DeviceTable

__all__ = ["Backend", "Picked", "Request", "Visits", "backends", "explain", "implementation", "names", "pick"]


class Implementation(Protocol):
    """What the module of a backend offers."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """out [B, Hq, Nq, Dv] and LSE [B, Hq, Nq]."""
        ...

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> Grads:
        """Gradients through out and LSE."""
        ...


@dataclass(frozen=True)
class Picked:
    """The backend that runs, why, what it reads ("plan", "counts" or "nothing"), and the block sizes of its plan."""

    name: str
    why: str
    needs: Needs
    blocks: tuple[int, int] | None = None


@dataclass(frozen=True)
class Backend:
    """A backend on this machine: its record, and what is missing here for a device (None if nothing)."""

    capability: Capability
    missing: Callable[[str], str | None]

    @property
    def name(self) -> str:
        """Its name."""
        return self.capability.name


Share = float | Visits
Kept = Share | Callable[[tuple[int, int]], Share]

_GUESTS = ("fa4_dense", "fa4", "cudnn_sparse")

# In the order in which "auto" asks. Patterns: block lists on the device's own kernel first, the definition last.
_ORDER = ("dense", "cpu", "windows", "gluon", "triton", "flex", *_GUESTS, "quantised", "reference")

# Time of a visited pair relative to blocks of 128 x 128, measured by bench/cpu_backend.py at 4,096 tokens.
_BLOCK_COST = {(128, 128): 1.0, (64, 64): 1.08}


def names() -> tuple[str, ...]:
    """All backends, in the order in which "auto" asks them."""
    return _ORDER


def backends() -> tuple[Backend, ...]:
    """All backends with what this machine lacks for them."""
    return tuple(_backend(name) for name in _ORDER)


def records() -> tuple[Any, ...]:
    """All that a choice rests on beside the request: what each backend can do, and how it says what is missing."""
    modules = [_module(name) for name in _ORDER]
    return (*[m.CAPABILITY for m in modules], *[getattr(m, "missing", None) for m in modules])


def implementation(name: str) -> Implementation:
    """The module of a backend, imported on first use."""
    return cast(Implementation, _module(name))


def pick(
    request: Request,
    backend: str,
    *,
    blocks: tuple[int, int] | None,
    kept: Kept,
    table: DeviceTable | None = None,
) -> Picked:
    """The backend for `request`.

    backend: "auto", or a name, which runs or raises ValueError.
    blocks: block sizes if the plan exists already. kept: visited share of all pairs, or a function of block sizes.
    table: measured calls of the device. With it, "auto" takes the backend with the least estimated time, guests and a
        dense kernel with the pattern as a mask among them; without it, or where it says nothing, the first that can.
    """
    if backend != "auto":
        chosen = _named(backend)
        reasons = _reasons(chosen, request, blocks)
        if reasons:
            others = [b.name for b in backends() if not _reasons(b, request, blocks)]
            legal = f"backends that can: {', '.join(others)}" if others else "no backend can"
            raise ValueError(f"backend={backend!r} cannot run this call: {'; '.join(reasons)}. For it, {legal}.")
        return _picked(chosen.capability, "asked for by name", request, blocks, kept)
    if table is not None:
        small = _small_windows(request) if blocks is None else None
        if small is not None:
            return small
        timed = _timed(table, request, blocks, kept)
        if timed:
            return timed[0][1]
    refused = []
    for candidate in backends():
        reasons = _reasons(candidate, request, blocks)
        if not reasons and candidate.capability.by_name_only is not None:
            reasons = [candidate.capability.by_name_only]
        if not reasons and blocks is not None and candidate.capability.needs == "windows":
            reasons = ["whether a plan is one of windows, its block sizes do not say; runs when named"]
        if not reasons:
            why = f"first that can on {request.device}"
            if refused:
                why += "; " + "; ".join(f"not {name}: {', '.join(words)}" for name, words in refused)
            return _picked(candidate.capability, why, request, blocks, kept)
        refused.append((candidate.name, reasons))
    every = "; ".join(f"{name}: {', '.join(words)}" for name, words in refused)
    raise ValueError(f"backend='auto' finds no backend for this call. {every}.")


def _small_windows(request: Request) -> Picked | None:
    """The kernels for windows of few keys, which tables of block lists say nothing about, where a tile of queries sees
    less than half of all keys (results/small_windows.csv).
    """
    found = _backend("windows")
    if request.keys is None or 2 * request.keys > request.nk or found.capability.by_name_only is not None:
        return None
    why = f"small windows: a tile of queries sees at most {request.keys} of {request.nk} keys"
    return None if _reasons(found, request, None) else Picked(found.name, why, found.capability.needs)


def _timed(
    table: DeviceTable, request: Request, blocks: tuple[int, int] | None, kept: Kept
) -> list[tuple[float, Picked]]:
    """Backends that can run the call and were measured, fastest first, with their estimated seconds; none where the one
    that would run without a table was not measured.
    """
    found: list[tuple[float, Picked]] = []
    usual = None
    for candidate in backends():
        c = candidate.capability
        if c.needs not in ("plan", "nothing") or _reasons(candidate, request, blocks):
            continue  # no table says what those would take
        usual = c.name if usual is None and c.by_name_only is None else usual
        sizes = [None] if c.needs != "plan" else [blocks] if blocks is not None else _fitting(c, request)
        if not callable(kept) or max(request.nq, request.nk) > _COMPARE:
            sizes = sizes[:1]
        for size in sizes:
            visits = _visits(kept, size)
            told = timing.seconds(table, c.name, request, size, visits, given=blocks is not None)
            if told is not None:
                found.append((told, Picked(c.name, "", c.needs, size)))
    masked = replace(request, bias=tuple(sorted({*request.bias, "dense"})), sparse=False)
    small = request.sparse and request.nq * request.nk <= timing.MASKED_DENSE and blocks is None
    if small and not _reasons(_backend("dense"), masked, None):
        told = timing.seconds(table, "dense", request, None, Visits(1.0))
        if told is not None:
            found.append((told, Picked("dense", "", "counts")))
    if all(p.name != usual for _, p in found):
        return []
    found.sort(key=lambda entry: entry[0])
    words = ", ".join(f"{p.name} {told * 1e3:.3g} ms" for told, p in found)
    why = f"fastest by the table of {table.name}; estimated: {words}"
    return [(told, replace(p, why=why)) for told, p in found]


def _visits(kept: Kept, size: tuple[int, int] | None) -> Visits:
    if size is None:
        return Visits(1.0)
    share = kept(size) if callable(kept) else kept
    return share if isinstance(share, Visits) else Visits(share)


def explain(
    request: Request,
    backend: str,
    *,
    blocks: tuple[int, int] | None,
    kept: Kept,
    table: DeviceTable | None = None,
) -> str:
    """Which backend runs, why, and why the others do not, a line each. An impossible call is explained, not raised."""
    lines = []
    try:
        picked = pick(request, backend, blocks=blocks, kept=kept, table=table)
        lines.append(f"runs: {picked.name} ({picked.why.split(';')[0]}), reads {picked.needs}")
        if picked.blocks is not None:
            share = _visits(kept, picked.blocks).total
            lines.append(
                f"blocks: {picked.blocks[0]} queries x {picked.blocks[1]} keys, visits {share:.2%} of all pairs"
            )
        if "; estimated: " in picked.why:
            lines.append("estimated: " + picked.why.split("; estimated: ")[1])
        chosen = picked.name
    except ValueError as error:
        lines.append(f"does not run: {error}")
        chosen = None
    for other in backends():
        if other.name == chosen:
            lines.append(f"  {other.name}: {other.capability.note}")
            continue
        reasons = _reasons(other, request, blocks)
        kept_back = other.capability.by_name_only
        can = "could run too" if kept_back is None else f"could run too ({kept_back})"
        words = "refuses " + "; ".join(reasons) if reasons else can
        lines.append(f"  {other.name}: {words}")
    return "\n".join(lines)


def _picked(capability: Capability, why: str, request: Request, blocks: tuple[int, int] | None, kept: Kept) -> Picked:
    if capability.needs == "windows" and blocks is not None:
        return Picked(capability.name, why, "plan", blocks)
    if capability.needs != "plan" or blocks is not None:
        return Picked(capability.name, why, capability.needs, blocks if capability.needs == "plan" else None)
    best = _blocks(capability, request, kept)
    return Picked(capability.name, why, "plan", best)


def _blocks(capability: Capability, request: Request, kept: Kept) -> tuple[int, int]:
    """The block sizes whose visited share costs least; short sequences take blocks of their own length."""
    fitting = _fitting(capability, request)
    if len(fitting) == 1 or not callable(kept) or max(request.nq, request.nk) > _COMPARE:
        return fitting[0]
    return min(fitting, key=lambda b: _visits(kept, b).total * _BLOCK_COST.get(b, 1.0))


def _fitting(capability: Capability, request: Request) -> list[tuple[int, int]]:
    """Block sizes that the sequence fills, best first; the smallest where it fills none."""
    fitting = [b for b in capability.blocks if b[0] <= max(1, request.nq) and b[1] <= max(1, request.nk)]
    return fitting if fitting else [capability.blocks[-1]]


_COMPARE = 1 << 14  # beyond so many tokens planning twice costs more than the better size saves


def _named(name: str) -> Backend:
    if name not in _ORDER:
        near = difflib.get_close_matches(str(name), (*_ORDER, "auto"), n=2, cutoff=0.4)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise ValueError(f"backend={name!r} is unknown; legal: auto, {', '.join(_ORDER)}.{hint}")
    return _backend(name)


def _reasons(backend: Backend, request: Request, blocks: tuple[int, int] | None) -> list[str]:
    lacking = backend.missing(request.device)
    planned = backend.capability.needs in ("plan", "windows")
    reasons = refusals(backend.capability, request, blocks if planned else None)
    return reasons if lacking is None else [lacking, *reasons]


def _backend(name: str) -> Backend:
    module = _module(name)
    return Backend(module.CAPABILITY, getattr(module, "missing", lambda device: None))


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"glocal.kernels.{'guests.' if name in _GUESTS else ''}{name}")
