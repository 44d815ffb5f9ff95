"""Which backends exist, what each can do, and which one a call gets: a pure function of records."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast

from torch import Tensor

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Needs, Request, refusals

__all__ = ["Backend", "Picked", "Request", "backends", "explain", "implementation", "names", "pick"]


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


Kept = float | Callable[[tuple[int, int]], float]

_GUESTS = ("fa4_dense", "fa4", "cudnn_sparse")

# In the order in which "auto" asks. Patterns: block lists on the device's own kernel first, the definition last.
_ORDER = ("dense", "cpu", "windows", "flex", "triton", *_GUESTS, "reference")

# Time of a visited pair relative to blocks of 128 x 128, measured by bench/cpu_backend.py at 4,096 tokens.
_BLOCK_COST = {(128, 128): 1.0, (64, 64): 1.08}


def names() -> tuple[str, ...]:
    """All backends, in the order in which "auto" asks them."""
    return _ORDER


def backends() -> tuple[Backend, ...]:
    """All backends with what this machine lacks for them."""
    return tuple(_backend(name) for name in _ORDER)


def implementation(name: str) -> Implementation:
    """The module of a backend, imported on first use."""
    return cast(Implementation, _module(name))


def pick(request: Request, backend: str, *, blocks: tuple[int, int] | None, kept: Kept) -> Picked:
    """The backend for `request`.

    backend: "auto", or a name, which runs or raises ValueError.
    blocks: block sizes if the plan exists already. kept: visited share of all pairs, or a function of block sizes.
    """
    if backend != "auto":
        chosen = _named(backend)
        reasons = _reasons(chosen, request, blocks)
        if reasons:
            others = [b.name for b in backends() if not _reasons(b, request, blocks)]
            legal = f"backends that can: {', '.join(others)}" if others else "no backend can"
            raise ValueError(f"backend={backend!r} cannot run this call: {'; '.join(reasons)}. For it, {legal}.")
        return _picked(chosen.capability, "asked for by name", request, blocks, kept)
    refused = []
    for candidate in backends():
        reasons = _reasons(candidate, request, blocks)
        if not reasons and candidate.capability.by_name_only is not None:
            reasons = [candidate.capability.by_name_only]
        if not reasons:
            why = f"first that can on {request.device}"
            if refused:
                why += "; " + "; ".join(f"not {name}: {', '.join(words)}" for name, words in refused)
            return _picked(candidate.capability, why, request, blocks, kept)
        refused.append((candidate.name, reasons))
    every = "; ".join(f"{name}: {', '.join(words)}" for name, words in refused)
    raise ValueError(f"backend='auto' finds no backend for this call. {every}.")


def explain(request: Request, backend: str, *, blocks: tuple[int, int] | None, kept: Kept) -> str:
    """Which backend runs, why, and why the others do not, a line each. An impossible call is explained, not raised."""
    lines = []
    try:
        picked = pick(request, backend, blocks=blocks, kept=kept)
        lines.append(f"runs: {picked.name} ({picked.why.split(';')[0]}), reads {picked.needs}")
        if picked.blocks is not None:
            share = kept(picked.blocks) if callable(kept) else kept
            lines.append(
                f"blocks: {picked.blocks[0]} queries x {picked.blocks[1]} keys, visits {share:.2%} of all pairs"
            )
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
    fitting = [b for b in capability.blocks if b[0] <= max(1, request.nq) and b[1] <= max(1, request.nk)]
    if not fitting:
        return capability.blocks[-1]
    if len(fitting) == 1 or not callable(kept) or max(request.nq, request.nk) > _COMPARE:
        return fitting[0]
    return min(fitting, key=lambda b: kept(b) * _BLOCK_COST.get(b, 1.0))


_COMPARE = 1 << 14  # beyond so many tokens planning twice costs more than the better size saves


def _named(name: str) -> Backend:
    if name not in _ORDER:
        near = difflib.get_close_matches(name, (*_ORDER, "auto"), n=2, cutoff=0.4)
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


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"glocal.kernels.{'guests.' if name in _GUESTS else ''}{name}")
