"""Calls of the window kernels: how many tiles and images a program takes, and the gradient of tables."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal.kernels._seen import Seen
from glocal.kernels.call import Call, Grads, TableBias
from glocal.kernels.capability import installed
from glocal.kernels.triton.defaults import padded
from glocal.kernels.windows.backward_tiles import keys_kernel, queries_kernel
from glocal.kernels.windows.forward_tiles import forward_kernel
from glocal.kernels.windows.tables import Tables, Tiles, tables

STAGES = 2  # of the loop over images, forward. Of bench/small_windows.py, as are the next ones.
WARPS = 8  # of a multiprocessor at once: a warp takes all registers that it can
SETUP = 1.5  # images that a program could do while it makes its tables
DIRECT_COLUMNS = 128  # of the widest tiles of 16 rows whose operands are read straight into registers
# Columns of such a tile that one warp takes; with more, warps share the tile.
WARP_COLUMNS = {"forward": 128, "queries": 128, "table": 64, "keys": 64}
PIECE = 64  # columns that backward takes at once
TABLE_COLUMNS = 64  # of a program that sums up the gradient of the logits in registers
_ENTRIES: WeakIdKeyDictionary = WeakIdKeyDictionary()
_TURNED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Known:
    """What backward is given: gradients of out and LSE, out and LSE."""

    grad_out: Tensor
    grad_lse: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True, eq=False)
class Launch:
    """direct: the kernel in Gluon. numbers: (heads, ratio, images, images a program, tiles, groups)."""

    tiles: Tiles
    direct: bool
    constants: dict[str, Any]
    numbers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Work:
    """One call. table: as `table_of` reads it. direct: Gluon may serve it."""

    call: Call
    tables: Tables
    batch: int
    heads: int
    ratio: int
    sizes: dict[str, Any]
    precision: str
    processors: int
    direct: bool
    table: tuple[Any, ...] | None

    @property
    def turned(self) -> tuple[Any, ...] | None:
        """The table for rows that are keys."""
        return None if self.table is None else (*self.table[:3], *_turned(*self.table[3:]))

    def serves(self, t: Tiles, part: str) -> bool:
        """Whether the kernels in Gluon take these tiles; forward has too few registers for a table or wide heads."""
        rows, columns = t.rows.shape[1], t.columns.shape[1]
        wide = columns > WARP_COLUMNS["forward"] or max(self.sizes["WD"], self.sizes["WDV"]) > 32
        if part == "forward" and (wide or self.table is not None):
            return False
        return self.direct and rows <= 16 and columns <= DIRECT_COLUMNS

    def launches(self, tiles: Iterable[Tiles], part: str) -> Iterable[Launch]:
        """Each set of tiles with all that its launch needs."""
        for t in tiles:
            (count, rows), n = t.rows.shape, t.columns.shape[1]
            direct = self.serves(t, part)
            if direct:
                split = max(1, n // WARP_COLUMNS[part]) if rows <= 16 else 1
                warps = max(4, split)
                group = warps // split if rows <= 16 else 1
                constants = {"G": group * split, "M": rows, "N": n // split, "SPLIT": split, "num_warps": warps}
            else:
                group = 4 if n <= 128 and rows <= 16 else 1  # wider tiles do not fit the registers of one warp
                warps = 4 if rows > 16 else group if group > 1 else max(1, n // 128)
                constants = {"G": group, "M": rows, "N": n, "PRECISION": self.precision, "num_warps": warps}
                constants["num_stages"] = STAGES if part == "forward" else 1
            groups = -(-count // group)
            at_once = self.processors * max(1, WARPS // warps)
            per = images_a_program(self.batch, self.heads * groups, at_once)
            constants |= self.sizes
            yield Launch(t, direct, constants, (self.heads, self.ratio, self.batch, per, count, groups))


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    b, h, n, _ = q.shape
    w = _work(q, k, v, call)
    covered = all_rows(w.tables.forward, n)
    out = (q.new_empty if covered else q.new_zeros)(b, h, n, v.shape[3])
    lse = (
        torch.full((b, h, n), -torch.inf, device=q.device) if not covered else q.new_empty(b, h, n, dtype=torch.float32)
    )
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    with _device(q):
        for one in w.launches(w.tables.forward, "forward"):
            t = one.tiles
            _start(
                "forward", one, _strided(q), _strided(k), _strided(v), out, lse, t.rows, t.columns, t.masks, w.table,
                float(call.scale), *one.numbers, n, **one.constants,
            )  # fmt: skip
    return out, lse


def backward(known: Known, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Grads:
    """Gradients through out and LSE, and of the table."""
    b, h, nq, d = q.shape
    dv = v.shape[3]
    w = _work(q, k, v, call)
    if 0 in (q.numel(), k.numel(), v.numel()):
        nothing = [torch.zeros_like(bias.table) for bias in call.bias if isinstance(bias, TableBias)]
        return Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), tuple(nothing))
    covered = all_rows(w.tables.forward, nq)
    make = torch.empty if covered else torch.zeros
    grad_q = make(b, h, nq, d, dtype=q.dtype, device=q.device)
    rows = make(b, h, nq, 2, dtype=torch.float32, device=q.device)
    grad, out = known.grad_out.contiguous(), known.out.contiguous()
    given = (
        _strided(q),
        _strided(k),
        _strided(v),
        out,
        grad,
        known.grad_lse.float().contiguous(),
        known.lse,
        rows,
        grad_q,
    )
    # Whether a warp has room for the sums of a table beside everything else.
    narrow = all(t.columns.shape[1] <= TABLE_COLUMNS or w.serves(t, "table") for t in w.tables.forward)
    partial: list[tuple[Tiles, Tensor]] = []

    def run(sets: Iterable[Tiles], queries: bool, table: bool) -> None:
        for one in w.launches(sets, "table" if table else "queries"):
            t = one.tiles
            chunks, count = -(-b // one.numbers[3]), len(t.rows)
            sums = torch.empty(chunks if table else 0, h, count, t.rows.shape[1], t.columns.shape[1], device=q.device)
            _start(
                "queries", one,
                *given, sums, t.rows, t.columns, t.masks, w.table, float(call.scale), *one.numbers, nq,
                QUERIES=queries, TABLE=table, SAME=k.stride() == v.stride() and d == dv, **_pieces(one.constants),
            )  # fmt: skip
            if table:
                partial.append((t, sums.sum(0)))

    with _device(q):
        run(w.tables.forward, True, bool(call.bias) and narrow)
        if call.bias and not narrow:
            run([piece for t in w.tables.forward for piece in t.split(TABLE_COLUMNS)], False, True)
        grad_k, grad_v = _keys(w, q, k, v, grad, rows)
    return Grads(grad_q, grad_k, grad_v, tuple(_of_table(bias, partial) for bias in call.bias))


def _keys(w: _Work, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """grad_k and grad_v; where several query heads share a key head, made for each in float32 and added up."""
    b, h, nq, d = q.shape
    nk, dv = k.shape[2], v.shape[3]
    dtype = k.dtype if w.ratio == 1 else torch.float32
    make = torch.empty if all_rows(w.tables.backward, nk) else torch.zeros
    grad_k = make(b, h, nk, d, dtype=dtype, device=k.device)
    grad_v = make(b, h, nk, dv, dtype=dtype, device=k.device)
    for one in w.launches(w.tables.backward, "keys"):
        t = one.tiles
        _start(
            "keys", one,
            _strided(q), _strided(k), _strided(v), grad, rows, grad_k, grad_v, t.rows, t.columns, t.masks,
            w.turned, float(w.call.scale), *one.numbers, nq, nk,
            SAME=q.stride() == grad.stride() and d == dv, **_pieces(one.constants),
        )  # fmt: skip
    if w.ratio == 1:
        return grad_k, grad_v
    return tuple(t.unflatten(1, (-1, w.ratio)).sum(2).to(k.dtype) for t in (grad_k, grad_v))  # type: ignore[return-value]


def _pieces(constants: dict[str, Any]) -> dict[str, Any]:
    """Backward holds two products of a piece at once."""
    return constants | {"PIECES": max(1, constants["N"] // PIECE)}


def _of_table(bias: Any, partial: list[tuple[Tiles, Tensor]]) -> Tensor:
    """The gradient of a table: each entry adds up its pairs in a fixed order."""
    assert isinstance(bias, TableBias)
    total = torch.zeros(partial[0][1].shape[0], bias.table.shape[1], device=bias.table.device)
    for t, sums in partial:
        entry, pair = _pairs(t, bias)
        flat = sums.flatten(1)  # [H, tiles * M * N]
        found = torch.where(pair >= 0, flat[:, pair.clamp(min=0)], 0).sum(-1)  # [H, entries that occur]
        total[:, entry] += found
    if bias.table.shape[0] == 1:
        total = total.sum(0, keepdim=True)
    return total.to(bias.table.dtype)


def _pairs(t: Tiles, bias: TableBias) -> tuple[Tensor, Tensor]:
    """Table entries that occur [E], and the pairs that read each, int64 [E, most], -1 pads; made once."""
    known = _ENTRIES.get(t.masks)
    if known is None or known[0] is not bias.q_code:
        rows, columns = t.rows.long(), t.columns.long()
        bits = (t.masks[..., None] >> torch.arange(32, device=rows.device, dtype=torch.int32)) & 1
        code = bias.k_code[columns.clamp(min=0)][:, None, :] - bias.q_code[rows.clamp(min=0)][:, :, None]
        seen = bits.flatten(-2).bool() & (code >= 0) & (code < bias.table.shape[1])
        pair = seen.flatten().nonzero().flatten()
        entry, which, counts = code.flatten()[pair].unique(return_inverse=True, return_counts=True)
        order = which.argsort(stable=True)
        place = torch.arange(len(order), device=rows.device) - (counts.cumsum(0) - counts)[which[order]]
        lists = torch.full((len(entry), int(counts.max()) if len(counts) else 0), -1, device=rows.device)
        lists[which[order], place] = pair[order]
        known = _ENTRIES[t.masks] = (bias.q_code, entry, lists)
    return known[1], known[2]


def _turned(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows and columns the other way round; made once."""
    known = _TURNED.get(ours)
    if known is None or not known[0].still((ours, theirs)):
        known = _TURNED[ours] = (Seen.of((ours, theirs)), -theirs, -ours)
    return known[1], known[2]


def all_rows(tiles: Iterable[Tiles], n: int) -> bool:
    """Whether the tiles hold all of n tokens."""
    return sum(t.tokens for t in tiles) == n


def _work(q: Tensor, k: Tensor, v: Tensor, call: Call) -> _Work:
    assert call.plan is not None
    if any(n * t.stride(2) >= 2**31 for t, n in ((q, q.shape[2]), (k, k.shape[2]), (v, v.shape[2]))):
        raise ValueError(
            "backend='windows' cannot run this call: one head of one image spans 2^31 entries or more; legal: fewer."
        )
    if len(call.bias) > 1 or any(not isinstance(bias, TableBias) for bias in call.bias):
        raise ValueError(f"backend='windows': {len(call.bias)} biases; legal: one relative table.")
    widths = padded(q.shape[3]), padded(v.shape[3])
    table = None
    for bias in call.bias:
        assert isinstance(bias, TableBias)
        values = bias.table.contiguous()
        stride = values.shape[1] if values.shape[0] > 1 else 0
        ours, theirs = bias.q_code.contiguous(), bias.k_code.contiguous()
        table = (values, stride, values.shape[1], ours, theirs)
    return _Work(
        call=call,
        tables=tables(call.plan, (call.q_block, call.kv_block), q.shape[2], k.shape[2]),
        batch=q.shape[0],
        heads=q.shape[1],
        ratio=q.shape[1] // k.shape[1],
        sizes={
            "D": q.shape[3],
            "DV": v.shape[3],
            "WD": widths[0],
            "WDV": widths[1],
        },
        precision="ieee" if q.dtype == torch.float32 else "tf32",
        processors=_processors(q.device),
        direct=q.dtype in (torch.bfloat16, torch.float16) and max(widths) <= 64 and _direct(q.device),
        table=table,
    )


def _start(part: str, one: Launch, *args: Any, **constants: Any) -> None:
    heads, _, images, per, _, groups = one.numbers
    _kernels(one.direct)[part][(groups * heads * -(-images // per),)](*args, **constants)


@lru_cache
def images_a_program(batch: int, programs: int, at_once: int) -> int:
    """Images that a program walks over: rounds of `at_once` programs then take the least time. programs: an image."""

    def time(images: int) -> float:
        return -(-programs * -(-batch // images) // at_once) * (images + SETUP)

    return min(range(1, min(batch, 256) + 1), key=time)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _kernels(direct: bool) -> dict[str, Any]:
    if not direct:
        return {"forward": forward_kernel, "queries": queries_kernel, "keys": keys_kernel}
    from glocal.kernels.windows import backward_direct, forward_direct

    return {
        "forward": forward_direct.forward_kernel,
        "queries": backward_direct.queries_kernel,
        "keys": backward_direct.keys_kernel,
    }


@cache
def _direct(device: torch.device) -> bool:
    """Whether the kernels in Gluon run here: they need products of NVIDIA's Ampere and later."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not installed("triton.experimental.gluon"):
        return False
    if device.type != "cuda":
        return True  # compiled for a card that is not there
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 8


def _strided(t: Tensor) -> tuple[Any, ...]:
    return (t, *t.stride())


def _device(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
