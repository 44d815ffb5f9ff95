"""What a backend can do, as a record, and the reasons why a request does not fit it, in words.

Nothing here asks the machine: devices and versions come in as values, so that any choice can be tested anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch

from glocal.kernels.call import Bias, TableBias

Needs = Literal["plan", "windows", "counts", "nothing"]
ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Request:
    """What a call asks for.

    bias: kinds among "dense" and "table". grad: gradients are wanted. sparse: there is a pattern.
    lse_grad: the LSE is returned, so that its gradient may be wanted too. quant: word of a Quant that is asked for.
    keys: most keys that a tile of queries sees together, None where the pattern has no plan of windows.
    """

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
    lse_grad: bool = False
    quant: str | None = None
    keys: int | None = None


@dataclass(frozen=True)
class Sizes:
    """Legal sizes: least to most (None: no end), multiples of `multiple` or powers of two."""

    least: int = 1
    most: int | None = None
    multiple: int = 1
    power: bool = False

    def allows(self, size: int) -> bool:
        """Whether `size` is legal."""
        if size < self.least or (self.most is not None and size > self.most) or size % self.multiple:
            return False
        return not self.power or size & (size - 1) == 0

    def __str__(self) -> str:
        kind = "powers of two" if self.power else "sizes" if self.multiple == 1 else f"multiples of {self.multiple}"
        return f"{kind} from {self.least}" + ("" if self.most is None else f" to {self.most}")


@dataclass(frozen=True)
class Capability:
    """One backend.

    needs: what it reads: block lists ("plan"), those of small windows ("windows"), how often each pair is seen
        ("counts"), or nothing (dense).
    group_ratios: query heads a key head. blocks: (query, key) block sizes worth planning for, best first.
    most_pairs: batch * heads * Nq * Nk that it may hold at once on devices `most_pairs_on` (empty: on all); None where
        it never holds them.
    most_heads: batch * query heads that it takes on CUDA.
    most_keys: keys of a tile that it may hold where it needs windows, with heads of `keys_at` channels or fewer; of
        wider ones as many fewer (`keys_held`).
    deterministic: two calls give equal bits. note: how it computes, for people.
    by_name_only: why "auto" passes over it unless it was measured on the device; None where "auto" may take it.
    graphs: a CUDA graph can hold calls, forward and backward: nothing waits for the device.
    equal_blocks: query and key blocks must have one size. packages: what it needs, (distribution, least version).
    training: the record that counts where gradients are wanted, None for this one.
    quant: it rounds as a Quant says, and runs where one is asked for alone.
    """

    name: str
    needs: Needs
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    note: str
    min_torch: tuple[int, int] = (2, 11)
    head_dims: Sizes = Sizes(1)
    value_dims: Sizes = Sizes(1)
    equal_dims: bool = False
    group_ratios: Sizes = Sizes(1)
    block_sizes: Sizes = Sizes(1)
    blocks: tuple[tuple[int, int], ...] = ()
    bias: tuple[str, ...] = ("dense", "table")
    softcap: bool = True
    segments: bool = True
    dropout: bool = False
    backward: bool = True
    lse_grad: bool = True
    empty: bool = True
    sparse: bool = True
    dense: bool = True
    most_keys: int | None = None
    keys_at: int = 64
    most_pairs: int | None = None
    most_pairs_on: tuple[str, ...] = ()
    most_heads: int | None = None
    deterministic: bool = True
    by_name_only: str | None = None
    graphs: bool = False
    equal_blocks: bool = False
    packages: tuple[tuple[str, str], ...] = ()
    training: Capability | None = None
    quant: bool = False

    def keys_held(self, head_dim: int) -> int | None:
        """Most keys of a tile at a head size; None: no end."""
        wide = 1 << max(head_dim - 1, 0).bit_length()  # as programs hold them
        return None if self.most_keys is None else self.most_keys * self.keys_at // max(self.keys_at, wide)


def refusals(
    capability: Capability, request: Request, blocks: tuple[int, int] | None, torch_version: str | None = None
) -> list[str]:
    """Why `capability` cannot serve `request`, one sentence a reason with what is legal; empty if it can.

    blocks: block sizes of a plan that exists already. torch_version: default the running one.
    """
    c, r, out = capability, request, []
    if r.grad and c.training is not None:
        c = c.training
    found = torch.__version__ if torch_version is None else torch_version
    if version(found) < c.min_torch:
        out.append(f"torch {found} is older than {c.min_torch[0]}.{c.min_torch[1]}")
    if r.device not in c.devices:
        out.append(f"device {r.device!r} (legal: {', '.join(c.devices)})")
    if r.dtype not in c.dtypes:
        out.append(f"dtype {_short(r.dtype)} (legal: {', '.join(map(_short, c.dtypes))})")
    for name, size, legal in (
        ("head size", r.head_dim, c.head_dims),
        ("value size", r.value_dim, c.value_dims),
        ("query heads a key head", r.q_heads // max(1, r.kv_heads), c.group_ratios if r.q_heads else Sizes(0)),
        *((f"{side} block", size, c.block_sizes) for side, size in zip(("query", "key"), blocks or (), strict=False)),
    ):
        if not legal.allows(size):
            out.append(f"{name} {size} (legal: {legal})")
    if c.equal_dims and r.head_dim != r.value_dim:
        out.append(f"value size {r.value_dim} differs from head size {r.head_dim} (legal: equal sizes)")
    if c.equal_blocks and blocks is not None and blocks[0] != blocks[1]:
        out.append(f"query blocks of {blocks[0]} with key blocks of {blocks[1]} (legal: equal sizes)")
    for kind in r.bias:
        if kind not in c.bias:
            legal_kinds = ", ".join(c.bias) if c.bias else "none"
            out.append(f"a {kind} bias (legal: {legal_kinds})")
    for name, wanted, can in (
        ("a soft-cap", r.softcap, c.softcap),
        ("lengths or documents", r.segments, c.segments),
        ("dropout", r.dropout, c.dropout),
        ("gradients", r.grad, c.backward),
        ("a gradient of the LSE", r.grad and r.lse_grad, c.lse_grad),
        ("a pattern", r.sparse, c.sparse),
        ("dense attention", not r.sparse, c.dense),
        ("quantisation", r.quant is not None, c.quant),
        ("exact attention", r.quant is None, not c.quant),
        ("an empty axis", 0 in (r.batch, r.q_heads, r.nq, r.nk), c.empty),
    ):
        if wanted and not can:
            out.append(f"{name} (not supported)")
    most = c.keys_held(max(r.head_dim, r.value_dim))
    if c.needs == "windows" and blocks is None and most is not None and (r.keys is None or r.keys > most):
        found = "no small windows" if r.keys is None else f"windows of {r.keys} keys a tile"
        out.append(f"{found} (legal: a product of single axes on one grid, up to {most} keys a tile)")
    pairs = r.batch * r.q_heads * r.nq * r.nk
    limited = not c.most_pairs_on or r.device in c.most_pairs_on
    if c.most_pairs is not None and limited and pairs > c.most_pairs:
        out.append(f"{pairs:,} query-key pairs at once (legal: up to {c.most_pairs:,}, it holds them all)")
    if c.most_heads is not None and r.device == "cuda" and r.batch * r.q_heads > c.most_heads:
        out.append(f"{r.batch * r.q_heads:,} heads of all samples (legal: up to {c.most_heads:,})")
    return out


@lru_cache(maxsize=64)
def installed(module: str) -> bool:
    """Whether a module can be imported. Looked up once a process: every call of attention asks."""
    return find_spec(module) is not None


@lru_cache(maxsize=64)
def version(text: str) -> tuple[int, int]:
    """("2.11.0+cpu") -> (2, 11)."""
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int("".join(ch for ch in minor if ch.isdigit()))


def bias_kind(bias: Bias) -> str:
    """The word of a Request for a bias."""
    return "table" if isinstance(bias, TableBias) else "dense"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
