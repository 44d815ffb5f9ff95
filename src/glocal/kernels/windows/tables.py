"""Tile tables of a plan whose query blocks list few keys: what each tile reads, both ways round, made once a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from glocal.kernels._seen import Seen
from glocal.kernels.call import PlanTensors
from glocal.kernels.triton.lists import check
from glocal.plan.blockplan import pack, unpack

MOST = 1024  # tokens on the other side of a tile
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of `rows` tokens [tiles, M] and the tokens [tiles, N] that any of them touches, -1 pads, int32.

    Neighbouring tiles share tokens. masks: int32 [tiles, M, N / 32], bit j % 32 of word j // 32 says whether the pair
        is seen.
    tokens: how many `rows` holds. used: columns that hold tokens come first; so many at most.
    """

    rows: Tensor
    columns: Tensor
    masks: Tensor
    tokens: int
    used: int
    _pieces: dict[int, list[Tiles]] = field(default_factory=dict, repr=False)

    def split(self, width: int) -> list[Tiles]:
        """Columns in pieces of `width`, a multiple of 32, each a set of tiles; the same ones at every call."""
        n = self.columns.shape[1]
        if n <= width:
            return [self]
        if width not in self._pieces:
            self._pieces[width] = [
                Tiles(
                    self.rows,
                    self.columns[:, at : at + width].contiguous(),
                    self.masks[:, :, at // 32 : (at + width) // 32].contiguous(),
                    self.tokens,
                    min(width, self.used - at),
                )
                for at in range(0, n, width)
            ]
        return self._pieces[width]


@dataclass(frozen=True, eq=False)
class Tables:
    """forward: tiles of queries with their keys. backward: tiles of keys with their queries; by width of the tables.

    apart: each key stands in one tile of queries, so that one pass over these makes all gradients. notes: what launches
    over them need, by kind of call.
    """

    forward: tuple[Tiles, ...]
    backward: tuple[Tiles, ...]
    apart: bool
    notes: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)


def tables(plan: PlanTensors, blocks: tuple[int, int], nq: int, nk: int) -> Tables:
    """Of a checked plan; kept as long as the plan is and stays as it is. ValueError for a plan of another kind."""
    mark, tensors = (blocks, nq, nk), tuple(vars(plan).values())
    known = _KNOWN.get(plan.part_index)
    if known is None or known[0] != mark or not known[1].still(tensors):
        check(plan, blocks)
        known = _KNOWN[plan.part_index] = (mark, Seen.of(tensors), _tables(plan, blocks, nq, nk))
    return known[2]


def _tables(plan: PlanTensors, blocks: tuple[int, int], nq: int, nk: int) -> Tables:
    q_block, kv_block = blocks
    if plan.q_order.shape[:2] != (1, 1) or plan.kv_order.shape[:2] != (1, 1) or plan.owner.numel() != 1:
        raise ValueError("backend='windows': the plan has lists or orders by sample or head; legal: one for all.")
    if kv_block != 32 or bool(plan.full_count.any()):
        raise ValueError(
            f"backend='windows' cannot run this call: key blocks of {kv_block} tokens, "
            f"{int(plan.full_count.sum())} of them full; legal: "
            "partial blocks of 32 (glocal.plan.windows.window_plan makes such plans)."
        )
    rows = plan.q_order.view(-1, q_block)  # [tiles, M]
    count, index = plan.part_count[0].long(), plan.part_index[0].long()
    live = torch.arange(index.shape[1], device=index.device) < count[:, None]
    columns = plan.kv_order.view(-1, kv_block)[index].masked_fill(~live[:, :, None], -1).flatten(1)  # [tiles, keys]
    seen = unpack(plan.masks, kv_block)[plan.part_mask[0].long()]  # [tiles, blocks, M, 32]
    seen = (seen & live[:, :, None, None]).transpose(1, 2).flatten(2)
    seen = seen & (rows >= 0)[:, :, None] & (columns >= 0)[:, None, :]
    tile, m, n = seen.nonzero(as_tuple=True)
    query, key = rows[tile, m].long(), columns[tile, n].long()
    pair = query * nk + key
    if len(pair.unique()) != len(pair) or len(rows[rows >= 0].unique()) != int((rows >= 0).sum()):
        raise ValueError("backend='windows': the plan lists a query or a pair twice; legal: each once.")
    forward = _by_width(rows.int(), columns.int(), seen)
    apart = torch.equal(columns[columns >= 0].sort().values.long(), torch.arange(nk, device=rows.device))

    # The other way round: keys tiled as the queries are where both sides are the same tokens, else in their order.
    like = rows if nq == nk and int((rows >= 0).sum()) == nk else _plain(nk, q_block, rows.device)
    home = torch.zeros(nk, dtype=torch.long, device=rows.device)
    home[like[like >= 0].long()] = (like >= 0).flatten().nonzero().flatten()
    tile, m = home[key] // q_block, home[key] % q_block
    touched, which = (tile * nq + query).unique(return_inverse=True)  # queries of each tile, in rising order
    owner = touched // nq
    counts = torch.bincount(owner, minlength=len(like))
    place = torch.arange(len(touched), device=rows.device) - (counts.cumsum(0) - counts)[owner]
    most = -(-max(int(counts.max()), 1) // 32) * 32
    columns = torch.full((len(like), most), -1, dtype=torch.int32, device=rows.device)
    columns[owner, place] = (touched % nq).int()
    seen = torch.zeros(len(like), q_block, most, dtype=torch.bool, device=rows.device)
    seen[tile, m, place[which]] = True
    return Tables(forward, _by_width(like.int(), columns, seen), apart)


def _by_width(rows: Tensor, columns: Tensor, seen: Tensor) -> tuple[Tiles, ...]:
    """Tiles in groups of like numbers of columns, padded to a power of two of at least 32."""
    last = torch.arange(1, columns.shape[1] + 1, device=rows.device) * (columns >= 0)
    lasts = last.amax(1).tolist() if columns.shape[1] else []
    widths = [max(32, 1 << (n - 1).bit_length()) if n <= 256 else -(-n // 128) * 128 for n in lasts]
    found = []
    for width in sorted(set(widths)):
        if width > MOST:
            raise ValueError(f"backend='windows': a tile touches {width} tokens; legal: up to {MOST}.")
        picked = [i for i, w in enumerate(widths) if w == width]
        chosen = torch.tensor(picked, device=rows.device)
        room = 1 << (width - 1).bit_length()
        more = max(0, room - columns.shape[1])
        found.append(
            Tiles(
                rows[chosen].contiguous(),
                pad(columns[chosen], (0, more), value=-1)[:, :room].contiguous(),
                pack(pad(seen[chosen], (0, more))[:, :, :room]).contiguous(),
                int((rows[chosen] >= 0).sum()),
                max(lasts[i] for i in picked),
            )
        )
    return tuple(found)


def _plain(n: int, block: int, device: torch.device) -> Tensor:
    return pad(torch.arange(n, device=device), (0, -n % block), value=-1).view(-1, block)
