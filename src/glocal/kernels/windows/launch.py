"""Calls of the window kernels: how many tiles and images a program takes, and the gradient of tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal.kernels._launch import on_device, start
from glocal.kernels._seen import Seen
from glocal.kernels.call import Call, Grads, TableBias
from glocal.kernels.capability import installed
from glocal.kernels.triton.defaults import padded
from glocal.kernels.windows.backward_tiles import keys_kernel, queries_kernel
from glocal.kernels.windows.backward_whole import whole_kernel
from glocal.kernels.windows.entries import entries_kernel
from glocal.kernels.windows.forward_tiles import forward_kernel
from glocal.kernels.windows.room import like, packed
from glocal.kernels.windows.tables import Tables, Tiles, tables

# Chosen on an H100 for the cases of bench/small_windows.py.
SETUP = 1.5  # images that a program could do while it makes its tables
STAGES = (
    3  # of the loop over images of kernels in Triton whose tiles are windows; else 2, or 1 for two passes of backward
)
STAGED, WHOLE_BYTES = 64, 256  # bytes of the longest rows that fit shared memory so often, and in one pass of backward
DIRECT_ROWS, DIRECT_COLUMNS = 16, 512  # of the largest tiles that kernels in Gluon take
PIECES = {"forward": 64, "queries": 32, "keys": 32}  # columns that a warp of those takes at once
REGISTERS = 168  # of a thread then, where it holds no table; backward of wide heads takes all
# Columns of a warp that holds a table; forward takes no wider tiles, backward shares them between warps.
TABLE_COLUMNS = {"forward": 256, "queries": 64, "keys": 128}
PIECE = 64  # columns that kernels in Triton take at once, backward
WHOLE_COLUMNS = 64  # of the widest tiles that one pass of backward takes, and of those whose program sums up a table
_ALL_REGISTERS = 65536
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
    itemsize: int
    precision: str
    processors: int
    direct: bool
    table: tuple[Any, ...] | None

    @property
    def turned(self) -> tuple[Any, ...] | None:
        """The table for rows that are keys."""
        return None if self.table is None else (*self.table[:3], *_turned(*self.table[3:]))

    @property
    def row(self) -> int:
        """Bytes of a row of a head, padded."""
        return max(self.sizes["WD"], self.sizes["WDV"]) * self.itemsize

    def serves(self, t: Tiles, part: str) -> bool:
        """Whether the kernels in Gluon take these tiles."""
        (_, rows), columns = t.rows.shape, t.columns.shape[1]
        if not self.direct or part not in PIECES or rows > DIRECT_ROWS or columns > DIRECT_COLUMNS:
            return False
        return part != "forward" or self.table is None or columns <= TABLE_COLUMNS[part]

    def launches(self, tiles: Sequence[Tiles], part: str) -> Sequence[Launch]:
        """Each set of tiles with all that its launch needs."""
        kind = (id(tiles), part, self.batch, self.heads, self.ratio, self.itemsize, *self.sizes.values())
        kind = (*kind, self.precision, self.processors, self.direct, self.table is None)
        kind = (*kind, images_a_program, DIRECT_COLUMNS)
        known = self.tables.notes.get(kind)
        if known is None:
            known = self.tables.notes[kind] = tiles, tuple(self._launches(tiles, part))
        return known[1]

    def _launches(self, tiles: Sequence[Tiles], part: str) -> Iterable[Launch]:
        for t in tiles:
            direct, count = self.serves(t, part), len(t.rows)
            constants, together = (self._straight if direct else self._tiled)(t, part)
            groups = -(-count // together)
            threads = 32 * constants["num_warps"]
            at_once = self.processors * max(1, _ALL_REGISTERS // (threads * constants.get("maxnreg", 256)))
            setup = SETUP * 2 if self.table is not None and part != "forward" else SETUP  # sums of tables leave too
            per = images_a_program(self.batch, self.heads * groups, at_once, setup)
            constants |= self.sizes
            yield Launch(t, direct, constants, (self.heads, self.ratio, self.batch, per, count, groups))

    def _straight(self, t: Tiles, part: str) -> tuple[dict[str, Any], int]:
        """Constants of a kernel in Gluon, and tiles a program."""
        (_, rows), n = t.rows.shape, t.columns.shape[1]
        split = 1 if self.table is None else max(1, n // TABLE_COLUMNS[part])
        warps, each = max(4, split), n // split
        piece = min(PIECES[part] if self.table is None else 32, each)
        constants = {"G": warps, "M": rows, "N": piece, "ALL": each, "SPLIT": split, "num_warps": warps}
        constants["PIECES"] = -(-t.used // piece) if split == 1 else each // piece
        if self.table is None and (part == "forward" or max(self.sizes["WD"], self.sizes["WDV"]) <= 32):
            constants["maxnreg"] = REGISTERS
        return constants, warps // split

    def _tiled(self, t: Tiles, part: str) -> tuple[dict[str, Any], int]:
        """Constants of a kernel in Triton, and tiles a program."""
        (_, rows), n = t.rows.shape, t.columns.shape[1]
        group = 4 if n <= 128 and rows <= 16 else 1  # wider tiles do not fit the registers of one warp
        warps = 4 if rows > 16 else group if group > 1 else max(1, n // 128)
        constants = {"G": group, "M": rows, "N": n, "PRECISION": self.precision, "num_warps": warps}
        staged = rows > 16 and self.row <= STAGED
        constants["num_stages"] = 1 if part not in ("forward", "whole") else STAGES if staged else 2
        if part in ("queries", "keys", "table"):
            constants["PIECES"] = max(1, n // PIECE)  # two products of a piece are held at once
        return constants, group


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], which lies as v does, and lse
    [B, Hq, Nq].
    """
    b, h, n, _ = q.shape
    w = _work(q, k, v, call)
    covered = all_rows(w.tables.forward, n)
    out = like(v, (b, h, n, v.shape[3]), zero=not covered)
    lse = (
        torch.full((b, h, n), -torch.inf, device=q.device) if not covered else q.new_empty(b, h, n, dtype=torch.float32)
    )
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    with on_device(q):
        for one in w.launches(w.tables.forward, "forward"):
            t = one.tiles
            _start(
                "forward", one, _strided(q), _strided(k), _strided(v), _strided(out), lse, t.rows, t.columns, t.masks,
                w.table, float(call.scale), *one.numbers, n, **one.constants,
            )  # fmt: skip
    return out, lse


def backward(known: Known, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Grads:
    """Gradients through out and LSE, and of the table; those of q, k and v lie as these do."""
    b, h, nq, d = q.shape
    dv = v.shape[3]
    w = _work(q, k, v, call)
    if 0 in (q.numel(), k.numel(), v.numel()):
        nothing = [torch.zeros_like(bias.table) for bias in call.bias if isinstance(bias, TableBias)]
        return Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), tuple(nothing))
    covered = all_rows(w.tables.forward, nq)
    out, grad = known.out, known.grad_out
    if grad.stride() != out.stride():
        grad = torch.empty_like(out).copy_(grad)
    given = (_strided(q), _strided(k), _strided(v), _strided(out), _strided(grad))
    given = (*given, known.grad_lse.float().contiguous(), known.lse)
    grad_q, grad_k, grad_v = _rooms(w, q, k, v)
    of_q, of_k, of_v = _strided(grad_q), _strided(grad_k), _strided(grad_v)
    partial: list[tuple[Tiles, Tensor]] = []
    narrow = all(t.columns.shape[1] <= WHOLE_COLUMNS for t in w.tables.forward) and w.row <= WHOLE_BYTES
    if w.tables.apart and narrow:
        same = len({(t.stride(), t.shape[3]) for t in (q, k, v, grad_q, grad_k, grad_v)}) == 1
        with on_device(q):
            for one in w.launches(w.tables.forward, "whole"):
                t, sums = one.tiles, _sums(one, bool(call.bias))
                _start(
                    "whole", one, *given, of_q, of_k, of_v, sums, t.rows, t.columns, t.masks, w.table,
                    float(call.scale), *one.numbers, nq, k.shape[2], TABLE=bool(call.bias), SAME=same,
                    **one.constants,
                )  # fmt: skip
                partial.append((t, sums))
            grad_k, grad_v = _added(w, grad_k, k), _added(w, grad_v, v)
            return Grads(grad_q, grad_k, grad_v, tuple(_of_table(bias, partial) for bias in call.bias))
    rows = (torch.empty if covered else torch.zeros)(b, h, nq, 2, dtype=torch.float32, device=q.device)

    def run(one: Launch, queries: bool, table: bool) -> None:
        t, sums = one.tiles, _sums(one, table)
        same = {} if one.direct else {"QUERIES": queries, "SAME": k.stride() == v.stride() and d == dv}
        _start(
            "queries", one, *given, rows, of_q, sums, t.rows, t.columns, t.masks, w.table,
            float(call.scale), *one.numbers, nq, TABLE=table, **same, **one.constants,
        )  # fmt: skip
        if table:
            partial.append((t, sums))

    with on_device(q):
        for one in w.launches(w.tables.forward, "queries"):
            # Whether a warp has room for the sums of a table beside everything else.
            narrow = one.direct or one.tiles.columns.shape[1] <= WHOLE_COLUMNS
            run(one, True, bool(call.bias) and narrow)
            if call.bias and not narrow:
                for piece in w.launches(one.tiles.split(WHOLE_COLUMNS), "table"):
                    run(piece, False, True)
        same = q.stride() == grad.stride() and d == dv
        for one in w.launches(w.tables.backward, "keys"):
            t = one.tiles
            _start(
                "keys", one, *given[:3], given[4], rows, of_k, of_v, t.rows, t.columns, t.masks,
                w.turned, float(call.scale), *one.numbers, nq, k.shape[2],
                **({} if one.direct else {"SAME": same}), **one.constants,
            )  # fmt: skip
        grad_k, grad_v = _added(w, grad_k, k), _added(w, grad_v, v)
        return Grads(grad_q, grad_k, grad_v, tuple(_of_table(bias, partial) for bias in call.bias))


def _sums(one: Launch, table: bool) -> Tensor:
    """Room for the gradient of the logits [programs over images, heads, tiles, M, N], nothing without a table."""
    heads, _, images, per, count, _ = one.numbers
    t = one.tiles
    return t.rows.new_empty(
        -(-images // per) if table else 0, heads, count, t.rows.shape[1], t.columns.shape[1], dtype=torch.float32
    )


def _rooms(w: _Work, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for grad_q, grad_k and grad_v; where several query heads share a key head, of these for each in float32."""
    queries, keys = (not all_rows(t, n) for t, n in ((w.tables.forward, q.shape[2]), (w.tables.backward, k.shape[2])))
    if w.ratio > 1:
        wide = [(k.shape[0], w.heads, *t.shape[2:]) for t in (k, v)]
        of_k, of_v = (like(t, s, zero=keys, dtype=torch.float32) for t, s in zip((k, v), wide, strict=True))
        return like(q, q.shape, zero=queries), of_k, of_v
    whole = packed((q, k, v), zero=queries or keys)
    if whole is not None:
        return whole[0], whole[1], whole[2]
    both = packed((k, v), zero=keys)
    of_k, of_v = both if both is not None else [like(t, t.shape, zero=keys) for t in (k, v)]
    return like(q, q.shape, zero=queries), of_k, of_v


def _added(w: _Work, grad: Tensor, like: Tensor) -> Tensor:
    """Gradients of query heads added up for each key head."""
    return grad if w.ratio == 1 else grad.unflatten(1, (-1, w.ratio)).sum(2).to(like.dtype)


def _of_table(bias: Any, partial: list[tuple[Tiles, Tensor]]) -> Tensor:
    """The gradient of a table: each entry adds up its pairs in a fixed order."""
    assert isinstance(bias, TableBias)
    heads = partial[0][1].shape[1]
    total = torch.zeros(heads, bias.table.shape[1], device=bias.table.device)
    for t, sums in partial:
        entries, pairs = _pairs(t, bias)
        flat = (sums[0] if len(sums) == 1 else sums.sum(0)).flatten(1)  # [H, tiles * M * N]
        numbers, (_, most), width = flat.shape[1], pairs.shape, total.shape[1]
        if len(entries):
            start(
                _kernels(False)["entries"], (len(entries), heads),
                flat, entries, pairs, total, numbers, most, width, BLOCK=1024,
            )  # fmt: skip
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
        itemsize=q.element_size(),
        precision="ieee" if q.dtype == torch.float32 else "tf32",
        processors=_processors(q.device),
        direct=q.dtype in (torch.bfloat16, torch.float16) and max(widths) <= 64 and _direct(q.device),
        table=table,
    )


def _start(part: str, one: Launch, *args: Any, **constants: Any) -> None:
    heads, _, images, per, _, groups = one.numbers
    start(_kernels(one.direct)[part], (groups * heads * -(-images // per),), *args, **constants)


@lru_cache
def images_a_program(batch: int, programs: int, at_once: int, setup: float = SETUP) -> int:
    """Images that a program walks over: rounds of `at_once` programs then take the least time. programs: an image."""

    def time(images: int) -> float:
        return -(-programs * -(-batch // images) // at_once) * (images + setup)

    return min(range(1, min(batch, 256) + 1), key=time)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _kernels(direct: bool) -> dict[str, Any]:
    if not direct:
        return {
            "forward": forward_kernel,
            "queries": queries_kernel,
            "keys": keys_kernel,
            "whole": whole_kernel,
            "entries": entries_kernel,
        }
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
