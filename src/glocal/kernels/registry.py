"""Which backends exist, what each can do, and which one a call gets: a pure function of records."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from glocal.kernels.call import Call, Grads


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
class Request:
    """What a call asks for."""

    device: str
    dtype: torch.dtype
    batch: int
    q_heads: int
    kv_heads: int
    nq: int
    nk: int
    head_dim: int
    value_dim: int
    bias: tuple[str, ...] = ()
    grad: bool = False
    softcap: bool = False
    segments: bool = False
    dropout: bool = False
    sparse: bool = True


@dataclass(frozen=True)
class Picked:
    """The backend that runs, why, what it reads ("plan", "counts" or "nothing"), and the block sizes of its plan."""

    name: str
    why: str
    needs: Literal["plan", "counts", "nothing"]
    blocks: tuple[int, int] | None = None


Kept = float | Callable[[tuple[int, int]], float]


def pick(request: Request, backend: str, *, blocks: tuple[int, int] | None, kept: Kept) -> Picked:
    """The backend for `request`.

    backend: "auto", or a name, which runs or raises ValueError.
    blocks: block sizes if the plan exists already. kept: visited share of all pairs, or a function of block sizes.
    """
    return Picked("reference", "the only backend", "counts")


def implementation(name: str) -> Implementation:
    """The module of a backend, imported on first use."""
    return importlib.import_module(f"glocal.kernels.{name}")  # type: ignore[return-value]
