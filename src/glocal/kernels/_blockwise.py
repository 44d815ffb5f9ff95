"""Attention from block lists in plain tensor code: gather key blocks, compute tile by tile, scatter rows back.

Memory is that of one tile beside inputs and outputs. Every sum runs in a fixed order, so results are bit-equal from
call to call. Keys with NaN or infinite entries are computed as zeros and then charged to the rows that see them, and
to those alone: such rows become NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.kernels._jobs import Chunk, Job, Limits, Units, jobs
from glocal.kernels._threads import each, width
from glocal.kernels._tiles import Lookup, MaskRows, RowGrads, Tokens, additive, tile_backward, tile_forward
from glocal.kernels.call import Call, DenseBias, Grads, PlanTensors

_WORTH = 1 << 16  # smaller queries are not dealt over threads


@dataclass(frozen=True, eq=False)
class _Work:
    """Inputs by unit and the jobs on them.

    q: [B * units, r, Nq, D]. k, v: [B * Hkv, Nk, D], finite. bad: bool [B * Hkv, Nk] keys whose k and v held NaN or
    infinity, None if none did.
    """

    call: Call
    units: Units
    q: Tensor
    k: Tensor
    v: Tensor
    bad: tuple[Tensor, Tensor] | None
    jobs: list[Job]
    masks: MaskRows
    high: torch.dtype

    def kv_member(self, members: Tensor) -> Tensor:
        """Key heads, as rows of k and v, of members."""
        return members // self.units.kv_step

    def parts(self, limits: Limits, threads: int) -> list[tuple[Job, Tensor]]:
        """Jobs with portions of their members: one a thread, more where one list alone exceeds the limits."""
        out = []
        for job in self.jobs:
            rows = max((c.shared for c in job.chunks), default=1) * self.call.q_block * self.units.rows
            length = max((c.blocks.shape[1] for c in job.chunks), default=1) * self.call.kv_block
            room = max(1, min(limits.keys // length, limits.scores // (length * rows)))
            room = min(room, -(-job.members.numel() // threads))
            out += [(job, members) for members in job.members.split(room)]
        return out


@dataclass(frozen=True, eq=False)
class _Tile:
    """One chunk for a portion of members: its tokens, what it adds to the logits, and how it gathers keys."""

    chunk: Chunk
    at: Tokens
    add: Tensor | None
    pick: _Pick


@dataclass(frozen=True, eq=False)
class _Pick:
    """Key blocks of a chunk: gathers tiles from keys in block order and adds gradients back."""

    blocks: Tensor
    size: int

    def __call__(self, ordered: Tensor) -> Tensor:
        """[n, KB * size, ...] -> [n, g, m * size, ...]."""
        g, m = self.blocks.shape
        first = int(self.blocks[0, 0])
        if g == 1 and bool((self.blocks[0] == torch.arange(first, first + m, device=self.blocks.device)).all()):
            return ordered[:, None, first * self.size : (first + m) * self.size]
        split = ordered.unflatten(1, (-1, self.size))
        return split.index_select(1, self.blocks.flatten()).flatten(1, 2).unflatten(1, (g, m * self.size))

    def add_back(self, ordered: Tensor, tile: Tensor) -> None:
        """The reverse: [n, g, m * size, D] added into [n, KB * size, D]."""
        split = ordered.unflatten(1, (-1, self.size))
        split.index_add_(1, self.blocks.flatten(), tile.reshape(tile.shape[0], -1, *split.shape[2:]))


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, limits: Limits) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    b, hq, nq, _ = q.shape
    threads = _width(q)
    w = _work(q, k, v, call, limits, threads)
    out = torch.zeros(*w.q.shape[:3], v.shape[3], dtype=w.high, device=q.device)
    lse = torch.full(w.q.shape[:3], -torch.inf, dtype=w.high, device=q.device)

    def piece(part: tuple[Job, Tensor]) -> None:
        job, members = part
        rows = _rows(w.q, members, job.q_tokens)  # [n, r, rows, D]
        ks, vs = (_keys(t, w.kv_member(members), job.k_tokens) for t in (w.k, w.v))
        tile_out = rows.new_empty(*rows.shape[:3], v.shape[3], dtype=w.high)
        tile_lse = rows.new_empty(rows.shape[:3], dtype=w.high)
        for tile in _tiles(w, job, members):
            cut = _cut(rows, tile.chunk, call).to(w.high)
            o, l = tile_forward(cut, tile.pick(ks).to(w.high), tile.pick(vs).to(w.high), tile.add, call)
            _taint(o, l, tile, w, members, job)
            _paste(tile_out, o, tile.chunk, call)
            _paste(tile_lse[..., None], l[..., None], tile.chunk, call)
        _scatter(out, lse, tile_out, tile_lse, members, job.q_tokens)

    each(piece, w.parts(limits, threads), threads)
    return out.view(b, hq, nq, v.shape[3]).to(q.dtype), lse.view(b, hq, nq)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: Call,
    limits: Limits,
) -> Grads:
    """Gradients through out and LSE; P is made again from the LSE, tile by tile."""
    # Units that share a key head, and biases, add to one place: their pieces run one after the other.
    threads = 1 if call.bias else _width(q)
    w = _work(q, k, v, call, limits, threads)
    threads = threads if w.units.kv_step == 1 else 1
    grad = grad_out.reshape(*w.q.shape[:3], v.shape[3])
    empty = (lse == -torch.inf).reshape(w.q.shape[:3])
    through_lse = grad_lse.reshape(empty.shape).to(w.high).masked_fill(empty, 0)
    delta = (grad.to(w.high) * out.reshape(grad.shape).to(w.high)).sum(-1) - through_lse
    end = lse.reshape(empty.shape).to(w.high).masked_fill(empty, torch.inf)
    grad_q = torch.zeros(w.q.shape, dtype=w.high, device=q.device)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=w.high, device=q.device) for t in (w.k, w.v))
    flat = [(b.values if isinstance(b, DenseBias) else b.table) for b in call.bias]
    grad_bias = [torch.zeros(t.numel(), dtype=w.high, device=q.device) for t in flat]

    def piece(part: tuple[Job, Tensor]) -> None:
        job, members = part
        pads, kv = job.q_tokens < 0, w.kv_member(members)
        rows, grads = (_rows(t, members, job.q_tokens) for t in (w.q, grad))
        marks = [_rows(t[..., None], members, job.q_tokens) for t in (end, delta)]
        if bool(pads.any()):
            marks[0] = marks[0].masked_fill(pads[:, None], torch.inf)
        ks, vs = (_keys(t, kv, job.k_tokens) for t in (w.k, w.v))
        tile_q = rows.new_empty(rows.shape, dtype=w.high)
        tile_k, tile_v = (torch.zeros(t.shape, dtype=w.high, device=q.device) for t in (ks, vs))
        for tile in _tiles(w, job, members):
            cut = [_cut(t, tile.chunk, call).to(w.high) for t in (rows, grads, *marks)]
            known = RowGrads(cut[1], cut[2][..., 0], cut[3][..., 0])
            found = tile_backward(cut[0], tile.pick(ks).to(w.high), tile.pick(vs).to(w.high), tile.add, known, call)
            _paste(tile_q, found.q, tile.chunk, call)
            tile.pick.add_back(tile_k, found.k)
            tile.pick.add_back(tile_v, found.v)
            split = found.bias.unflatten(2, (w.units.rows, -1))  # [n, g, r, rows, L]
            for bias, total in zip(call.bias, grad_bias, strict=True):
                Lookup.of(bias, tile.at).write(total, split)
        _add_rows(grad_q, tile_q, members, job.q_tokens)
        _add_rows(grad_k[:, None], tile_k[:, None], kv, job.k_tokens)
        _add_rows(grad_v[:, None], tile_v[:, None], kv, job.k_tokens)

    each(piece, w.parts(limits, threads), threads)
    return Grads(
        grad_q.view(q.shape).to(q.dtype),
        grad_k.view(k.shape).to(k.dtype),
        grad_v.view(v.shape).to(v.dtype),
        tuple(g.view(t.shape).to(t.dtype) for g, t in zip(grad_bias, flat, strict=True)),
    )


def _width(q: Tensor) -> int:
    """Threads for this call."""
    return width() if q.device.type == "cpu" and q.numel() >= _WORTH else 1


def _work(q: Tensor, k: Tensor, v: Tensor, call: Call, limits: Limits, threads: int) -> _Work:
    assert call.plan is not None
    plan: PlanTensors = call.plan
    batch, hq, hkv = q.shape[0], q.shape[1], k.shape[1]
    units = Units.of(plan, hq, hkv)
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    live = batch > 0 and q.shape[2] > 0 and k.shape[2] > 0 and hq > 0
    k3, v3 = k.reshape(batch * hkv, *k.shape[2:]), v.reshape(batch * hkv, *v.shape[2:])
    bad = None
    if not bool(k3.sum(dtype=high).isfinite()) or not bool(v3.sum(dtype=high).isfinite()):
        bad_k, bad_v = (~t.isfinite().all(-1) for t in (k3, v3))
        if bool((bad_k | bad_v).any()):
            bad = (bad_k, bad_v)
            k3, v3 = k3.masked_fill(bad_k[..., None], 0), v3.masked_fill(bad_v[..., None], 0)
    return _Work(
        call=call,
        units=units,
        q=q.reshape(batch * units.count, units.rows, *q.shape[2:]),
        k=k3,
        v=v3,
        bad=bad,
        jobs=jobs(plan, units, batch, (call.q_block, call.kv_block), limits, threads) if live else [],
        masks=MaskRows(plan.masks, call.kv_block, high),
        high=high,
    )


def _tiles(w: _Work, job: Job, members: Tensor) -> Iterator[_Tile]:
    """Chunks of a job with what they add to the logits."""
    block = w.call.q_block
    sample, unit = members // w.units.count, members % w.units.count
    heads = unit[:, None] * w.units.rows + torch.arange(w.units.rows, device=members.device)
    padded = bool((job.k_tokens < 0).any())
    for chunk in job.chunks:
        pick = _Pick(chunk.blocks, w.call.kv_block)
        begin, rows = chunk.start * block, chunk.lists * chunk.shared * block
        q = job.q_tokens[begin : begin + rows].view(chunk.lists, -1)
        at = Tokens(q, pick(job.k_tokens[None])[0], sample, heads)
        holes = padded and bool((at.k < 0).any())
        yield _Tile(chunk, at, additive(w.call, at, chunk.masks, w.masks, chunk.shared, holes), pick)


def _taint(out: Tensor, lse: Tensor, tile: _Tile, w: _Work, members: Tensor, job: Job) -> None:
    """NaN for the rows of a tile that see a key which was not finite."""
    if w.bad is None:
        return
    kv = w.kv_member(members)
    for bad, spoilt in zip(w.bad, ((out, lse), (out,)), strict=True):
        ill = _keys(bad[..., None], kv, job.k_tokens)
        here = tile.pick(ill)[..., 0][:, :, None]  # [n, g, 1, L]
        seen = here.expand(*out.shape[:3], -1) if tile.add is None else here & (tile.add > -torch.inf)
        rows = seen.any(-1)
        for t in spoilt:
            t.masked_fill_(rows[..., None] if t.dim() == 4 else rows, torch.nan)


def _rows(t: Tensor, members: Tensor, tokens: Tensor) -> Tensor:
    """[all members, r, N, D] -> [n, r, rows, D] in the order of a job; pads are 0."""
    return _take(_members(t, members), 2, tokens)


def _keys(t: Tensor, members: Tensor, tokens: Tensor) -> Tensor:
    """[all key members, N, D] -> [n, key blocks * kv_block, D] in block order; pads are 0."""
    return _take(_members(t, members), 1, tokens)


def _members(t: Tensor, members: Tensor) -> Tensor:
    n, first = members.numel(), int(members[0])
    if bool((members == torch.arange(first, first + n, device=members.device)).all()):
        return t[first : first + n]
    return t.index_select(0, members)


def _take(t: Tensor, axis: int, tokens: Tensor) -> Tensor:
    if tokens.numel() == t.shape[axis] and bool((tokens == torch.arange(tokens.numel(), device=tokens.device)).all()):
        return t
    found = t.index_select(axis, tokens.clamp(min=0))
    pads = tokens < 0
    return found.masked_fill_(pads[:, None], 0) if bool(pads.any()) else found


def _span(chunk: Chunk, call: Call) -> slice:
    return slice(chunk.start * call.q_block, (chunk.start + chunk.lists * chunk.shared) * call.q_block)


def _cut(rows: Tensor, chunk: Chunk, call: Call) -> Tensor:
    """Rows of a chunk, [n, r, rows, D] -> [n, lists, r * shared * q_block, D]."""
    return rows[:, :, _span(chunk, call)].unflatten(2, (chunk.lists, -1)).transpose(1, 2).flatten(2, 3)


def _paste(rows: Tensor, tile: Tensor, chunk: Chunk, call: Call) -> None:
    """The reverse of `_cut`, written into `rows`."""
    rows[:, :, _span(chunk, call)].unflatten(2, (chunk.lists, -1)).copy_(
        tile.unflatten(2, (rows.shape[1], -1)).transpose(1, 2)
    )


def _add_rows(to: Tensor, rows: Tensor, members: Tensor, tokens: Tensor) -> None:
    """Add [n, r, rows, D] at tokens [rows] of `to` [all members, r, N, D]; members and tokens may repeat."""
    valid = tokens >= 0
    if not bool(valid.all()):
        rows, tokens = rows[:, :, valid], tokens[valid]
    back = torch.zeros(rows.shape[0], *to.shape[1:], dtype=to.dtype, device=to.device)
    to.index_add_(0, members, back.index_add_(2, tokens, rows))


def _scatter(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor, members: Tensor, tokens: Tensor) -> None:
    """Rows to their tokens; a query that stands in several blocks merges what it saw in each."""
    rounds = _rounds(tokens)
    for places in rounds:
        some = tokens[places]
        o, l = (t if some.numel() == tokens.numel() else t[:, :, places] for t in (tile_out, tile_lse))
        if len(rounds) > 1:
            old, old_lse = (t.index_select(0, members).index_select(2, some) for t in (out, lse))
            both = torch.logaddexp(old_lse, l)
            mine, theirs = (torch.where(both == -torch.inf, 0, torch.exp(t - both))[..., None] for t in (l, old_lse))
            # A row that only one side has seen takes that side's value untouched.
            o = torch.where(theirs == 0, o, torch.where(mine == 0, old, o * mine + old * theirs))
            l = both
        for i, member in enumerate(members.tolist()):
            out[member].index_copy_(1, some, o[i])
            lse[member].index_copy_(1, some, l[i])


def _rounds(tokens: Tensor) -> list[Tensor]:
    """Places of the valid tokens, dealt out so that no round holds a token twice."""
    places = (tokens >= 0).nonzero().flatten()
    sorted_tokens, order = tokens[places].sort(stable=True)
    _, counts = sorted_tokens.unique_consecutive(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    turn = torch.arange(places.numel(), device=tokens.device) - first
    if counts.numel() and int(counts.max()) == 1:
        return [places]
    return [places[order[turn == i]] for i in range(int(counts.max()) if counts.numel() else 0)]
