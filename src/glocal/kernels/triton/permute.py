"""Token reordering in one pass over several tensors, with RMS-norm and rotary embedding on the way.

A program moves the rows of one tile of slots for one head of one tensor. Heads run fastest, then tensors: what they
share (the order, tables of angles, tokens whose heads lie side by side) is read from memory once and then from cache.
`glocal.kernels.permute` is the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from glocal.kernels.permute import Finish, check, check_rows
from glocal.kernels.triton.defaults import ROWS, padded
from glocal.kernels.triton.lists import Slots
from glocal.kernels.triton.merge import fold_kernel

# Entries of a tile and warps, by what happens to the rows; the fastest of bench/permute.py --tune.
_TILES = {"move": (8192, 4), "side by side": (16384, 4), "apart": (4096, 4), "across": (2048, 8)}
_SORTED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def gather_rows(tensors: Sequence[Tensor], order: Tensor, finish: Sequence[Finish | None] = ()) -> list[Tensor]:
    """tensors: [B, H, N, D] each, heads may differ, any strides; order: [B|1, H|1, M], -1 gives rows of 0.

    Returns [B, H, M, D] each. finish: what happens to each tensor's rows on the way.
    """
    check(tensors, order, finish)
    outs = [torch.empty(*t.shape[:2], order.shape[2], t.shape[3], dtype=t.dtype, device=t.device) for t in tensors]
    steps = list(finish) if finish else [None] * len(tensors)
    for size in sorted({t.shape[3] for t in tensors}):
        for batch in sorted({t.shape[0] for t in tensors}):
            group = [i for i, t in enumerate(tensors) if (t.shape[3], t.shape[0]) == (size, batch)]
            if group:
                _move([tensors[i] for i in group], [outs[i] for i in group], order, [steps[i] for i in group], False)
    return outs


def finish_rows(tensors: Sequence[Tensor], finish: Sequence[Finish]) -> list[Tensor]:
    """Norm and rotation where rows lie: tensors [B, H, N, D] each -> the same shapes, in memory as they were."""
    check_rows(tensors, finish)
    outs = [torch.empty_like(t) for t in tensors]
    for t, out, step in zip(tensors, outs, finish, strict=True):
        _move([t], [out], _as_they_lie(t.shape[2], t.device), [step], False)
    return outs


@lru_cache(maxsize=8)
def _as_they_lie(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=device)[None, None]


def scatter_rows(t: Tensor, order: Tensor, n: int, out: Tensor | None = None, finish: Finish | None = None) -> Tensor:
    """t: [B, H, M, D] -> [B, H, n, D]; each token stands at most once in the order.

    A token outside the order is 0, or stays as it is in `out`. finish: as in `gather_rows`, by token.
    """
    check([t], order, [])
    if out is not None:
        if finish is not None:
            check([out], order, [finish])
        _move([t], [out], order, [finish], True)
        return out
    out = torch.empty(*t.shape[:2], n, t.shape[3], dtype=t.dtype, device=t.device)
    if finish is not None:
        check([out], order, [finish])
        return scatter_rows(t, order, n, out.zero_(), finish)
    _move([t], [out], inverse(order, n), [None], False)
    return out


def sum_rows(t: Tensor, order: Tensor, n: int) -> Tensor:
    """Each token's rows added up in float32, in rising order of slots: t [B, H, M, D] -> [B, H, n, D]."""
    out = torch.empty(*t.shape[:2], n, t.shape[3], dtype=t.dtype, device=t.device)
    if out.numel() == 0 or t.shape[2] == 0:
        return out.zero_()
    heads, tiles, back = t.shape[1], -(-n // ROWS), _slots(order, n)
    with torch.cuda.device(t.device) if t.is_cuda else nullcontext():
        _start(
            fold_kernel, t.shape[0] * heads * tiles,
            t.contiguous(), out, _row(back.slots, heads), _row(back.starts, heads), heads, 1, 1,
            n, order.shape[2], tiles, D=t.shape[3], WD=padded(t.shape[3]), BN=ROWS,
        )  # fmt: skip
    return out


def _slots(order: Tensor, n: int) -> Slots:
    """The slots of each token; sorted once for each order, unless it is changed."""
    mark = (n, order.data_ptr(), 0 if order.is_inference() else order._version)
    known = _SORTED.get(order)
    if known is None or known[0] != mark:
        known = _SORTED[order] = (mark, Slots.of(order, n))
    return known[1]


def _row(t: Tensor, heads: int) -> tuple[Any, ...]:
    """For `row_of`."""
    return (t, t.stride(0) if t.shape[0] > 1 else 0, t.stride(1) if t.shape[1] > 1 else 0, heads // t.shape[1])


def inverse(order: Tensor, n: int) -> Tensor:
    """The slot of each token, int32 [B|1, H|1, n], -1 for none; each token stands at most once in the order."""
    room = torch.full((*order.shape[:2], n + 1), -1, dtype=torch.int32, device=order.device)
    slot = torch.arange(order.shape[2], dtype=torch.int32, device=order.device)
    return room.scatter_(2, torch.where(order < 0, n, order).long(), slot.expand(order.shape))[:, :, :n]


def _move(tensors: list[Tensor], outs: list[Tensor], order: Tensor, finish: list[Finish | None], scatter: bool) -> None:
    """Tensors of one head size and batch; order gives the token of each slot, on the other side where `scatter`."""
    batch, size = tensors[0].shape[0], tensors[0].shape[3]
    slots = order.shape[2]
    width = padded(size)
    jobs, first, kinds = [], 0, set()
    for t, out, step in zip(tensors, outs, finish, strict=True):
        step = Finish() if step is None else step
        across = step.across(t.shape[1], size)
        units = 1 if across else t.shape[1]
        tables = tuple(_table(x, t if not scatter else out) for x in (step.cos, step.sin))
        kind = 0 if step.cos is None else 1 if step.interleaved else 2
        kinds |= {"across"} if across else {("move", "side by side", "apart")[kind]}
        weight = None if step.weight is None else step.weight.contiguous()
        jobs.append(
            (t, *t.stride(), out, *out.stride(), first, first + units, t.shape[1], t.shape[1] // order.shape[1], weight,
             float(step.eps), *tables, across, kind)
        )  # fmt: skip
        first += units
    if 0 in (first, batch, slots, size):
        return
    entries, warps = _TILES[next(name for name in reversed(_TILES) if name in kinds)]
    tile = max(1, entries // width)
    tiles = -(-slots // tile)
    row = (order, *(order.stride(i) if order.shape[i] > 1 else 0 for i in (0, 1)), order.stride(2))
    places = tuple((j[:14]) for j in jobs)
    steps = tuple((j[14:18]) for j in jobs)
    with torch.cuda.device(order.device) if order.is_cuda else nullcontext():
        _start(
            move_kernel, batch * tiles * first, places, steps, row, slots, tiles, first,
            ACROSS=tuple(j[18] for j in jobs), KIND=tuple(j[19] for j in jobs),
            SIZE=size, WIDE=width, TILE=tile, SCATTER=scatter, num_warps=warps,
        )  # fmt: skip


def _start(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    kernel[(programs,)](*args, **constants)


def _table(table: Tensor | None, t: Tensor) -> tuple[Any, ...] | None:
    if table is None:
        return None
    return (table, *table.expand(t.shape[0], t.shape[1], t.shape[2], t.shape[3] // 2).stride())


@triton.jit
def move_kernel(
    places, steps, order, slots, tiles, units,
    ACROSS: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
    SCATTER: tl.constexpr,
):  # fmt: skip
    """places: a tensor each (from, 4 strides, to, 4 strides, first unit, end of units, heads, heads an order head).

    steps: (norm weight, eps, cos, sin) each. A unit is one head, or all of them where the norm runs ACROSS.
    KIND: 0 no rotation, 1 pairs side by side, 2 pairs half a head apart.
    """
    pid = tl.program_id(0)
    unit = pid % units
    b = (pid // units) // tiles
    slot = (pid // units) % tiles * TILE + tl.arange(0, TILE)
    for i in tl.static_range(len(places)):  # pyright: ignore[reportGeneralTypeIssues]
        if (unit >= places[i][10]) & (unit < places[i][11]):
            if ACROSS[i]:
                _all_heads(places[i], steps[i], order, slot, slots, b, KIND[i], SIZE, WIDE, SCATTER)
            else:
                h = unit - places[i][10]
                token = _tokens(order, slot, slots, b, h // places[i][13])
                _one_head(places[i], steps[i], 0.0, token, slot, slots, b, h, False, KIND[i], SIZE, WIDE, SCATTER)


@triton.jit
def _tokens(order, slot, slots, b, row):
    place = order[0] + b.to(tl.int64) * order[1] + row.to(tl.int64) * order[2]
    return tl.load(place + slot.to(tl.int64) * order[3], mask=slot < slots, other=-1).to(tl.int64)


@triton.jit
def _all_heads(
    place, step, order, slot, slots, b, KIND: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    SCATTER: tl.constexpr,
):  # fmt: skip
    """The mean square of a token over all heads first; the second reading of the rows comes from cache."""
    token = _tokens(order, slot, slots, b, b * 0)
    column = tl.arange(0, WIDE)
    total = tl.zeros(slot.shape, tl.float32)
    for h in range(place[12]):
        at = _from(place, token, slot, b, h + b * 0, SCATTER)
        live = (token >= 0)[:, None] & (column < SIZE)[None, :]
        x = tl.load(at[:, None] + column.to(tl.int64)[None, :] * place[4], mask=live, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    mean = total / (SIZE * place[12])
    for h in range(place[12]):
        _one_head(place, step, mean, token, slot, slots, b, h + b * 0, True, KIND, SIZE, WIDE, SCATTER)


@triton.jit
def _from(place, token, slot, b, h, SCATTER: tl.constexpr):
    """Start of each row to read."""
    start = place[0] + b.to(tl.int64) * place[1] + h.to(tl.int64) * place[2]
    return start + (slot.to(tl.int64) if SCATTER else token) * place[3]


@triton.jit
def _one_head(
    place, step, mean, token, slot, slots, b, h, ACROSS: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Rows of one head. mean: of the squares where the norm runs ACROSS heads."""
    source = _from(place, token, slot, b, h, SCATTER)[:, None]
    start = place[5] + b.to(tl.int64) * place[6] + h.to(tl.int64) * place[7]
    target = (start + (token if SCATTER else slot.to(tl.int64)) * place[8])[:, None]
    known = (token >= 0)[:, None]
    written = known if SCATTER else (slot < slots)[:, None]
    HALF: tl.constexpr = SIZE // 2
    if KIND == 2:
        column = tl.arange(0, WIDE // 2)[None, :]
        inside = column < HALF
        at = column.to(tl.int64)
        x = tl.load(source + at * place[4], mask=known & inside, other=0.0)
        y = tl.load(source + (at + HALF) * place[4], mask=known & inside, other=0.0)
        a, c = x.to(tl.float32), y.to(tl.float32)
        if step[0] is not None:
            weight = step[0] + (h * SIZE if ACROSS else 0)
            if not ACROSS:
                mean = (tl.sum(a * a, 1) + tl.sum(c * c, 1)) / SIZE
            rate = tl.rsqrt(mean + step[1])[:, None]
            a = a * rate * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            c = c * rate * tl.load(weight + column + HALF, mask=inside, other=0.0).to(tl.float32)
        cos, sin = _angles(step[2], token, b, h, at, known & inside), _angles(step[3], token, b, h, at, known & inside)
        tl.store(target + at * place[9], (a * cos - c * sin).to(x.dtype), mask=written & inside)
        tl.store(target + (at + HALF) * place[9], (a * sin + c * cos).to(x.dtype), mask=written & inside)
    else:
        column = tl.arange(0, WIDE)[None, :]
        inside = column < SIZE
        at = column.to(tl.int64)
        x = tl.load(source + at * place[4], mask=known & inside, other=0.0)
        if (step[0] is not None) or (KIND == 1):
            y = x.to(tl.float32)
            if step[0] is not None:
                weight = step[0] + (h * SIZE if ACROSS else 0)
                if not ACROSS:
                    mean = tl.sum(y * y, 1) / SIZE
                y = (
                    y
                    * tl.rsqrt(mean + step[1])[:, None]
                    * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
                )
            if KIND == 1:
                half = tl.arange(0, WIDE // 2)[None, :]
                live = known & (half < HALF)
                a, c = tl.split(y.reshape(y.shape[0], WIDE // 2, 2))
                cos, sin = _angles(step[2], token, b, h, half, live), _angles(step[3], token, b, h, half, live)
                y = tl.join(a * cos - c * sin, a * sin + c * cos).reshape(y.shape[0], WIDE)
            x = y.to(x.dtype)
        tl.store(target + at * place[9], x, mask=written & inside)


@triton.jit
def _angles(table, token, b, h, column, live):
    """cos or sin, float32 [rows, columns]. table: (values, strides of sample, head, token, column)."""
    start = table[0] + b.to(tl.int64) * table[1] + h.to(tl.int64) * table[2]
    place = token[:, None] * table[3] + column.to(tl.int64) * table[4]
    return tl.load(start + place, mask=live, other=0.0).to(tl.float32)
