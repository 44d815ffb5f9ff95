"""The two sides of one attention call: the canvases of queries and keys, and what is decided at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from glocal.canvas.parts import Canvas, Coords

Policy = Literal["all", "none", "causal"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Queries on `q`, keys on `kv`; a pair inside one grid (parts of the same name) is decided by the pattern.

    policy: (query part, key part) -> "all" | "none" | "causal" for every other pair; "*" matches any part and the
        default is "all". Causal compares linear indices.
    lengths: part name -> valid tokens per sample, int32 [B]; later tokens of the part are padding.
    documents: int32 [B, N] for both sides, or a (queries, keys) pair; a token sees its own document only,
        -1 is padding: it sees nothing and nobody sees it.
    q_start, kv_start: first token of the canvas that is present (a decode step, a chunk, a shard).
    q_tokens, kv_tokens: how many are present; None means all that follow.

    `lengths` and `documents` are run-time tensors: they never enter `key` and never rebuild a plan.
    """

    q: Canvas
    kv: Canvas
    policy: Mapping[tuple[str, str], Policy] = field(default_factory=dict)
    lengths: Mapping[str, Tensor] = field(default_factory=dict)
    documents: Tensor | tuple[Tensor, Tensor] | None = None
    q_start: int = 0
    kv_start: int = 0
    q_tokens: int | None = None
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        for side, canvas in (("q", self.q), ("kv", self.kv)):
            if not isinstance(canvas, Canvas):
                raise TypeError(f"Layout: {side}={canvas!r} is a {type(canvas).__name__}; legal: a Canvas.")
        if not isinstance(self.lengths, (dict, Mapping)) or any(
            not isinstance(n, Tensor) for n in self.lengths.values()
        ):
            raise TypeError(
                f"Layout: lengths={self.lengths!r}; legal: names of parts with int tensors [batch], such as "
                f"{{{self.q.parts[-1].name!r}: torch.tensor([20, 24])}}."
            )
        if self.documents is not None:
            sides = self.documents if isinstance(self.documents, tuple) else (self.documents,)
            if not all(side is None or isinstance(side, Tensor) for side in sides):
                raise TypeError("Layout: documents are no tensors; legal: int [batch, tokens], or (queries, keys).")
        for pair, rule in self.policy.items():
            if rule not in ("all", "none", "causal"):
                raise ValueError(f"Layout: policy[{pair!r}]={rule!r}; legal: 'all', 'none', 'causal'.")
            for side, name in zip((self.q, self.kv), pair, strict=True):
                if name != "*":
                    side.number(name)
        for name in self.lengths:
            if name not in {p.name for p in (*self.q.parts, *self.kv.parts)}:
                self.kv.number(name)
        for side, canvas, start, tokens in (
            ("q", self.q, self.q_start, self.q_tokens),
            ("kv", self.kv, self.kv_start, self.kv_tokens),
        ):
            if not 0 <= start <= canvas.size or (tokens is not None and start + tokens > canvas.size):
                raise ValueError(
                    f"Layout: {side}_start={start} with {side}_tokens={tokens} leaves {canvas!r} of "
                    f"{canvas.size} tokens."
                )

    @staticmethod
    def of(canvas: Canvas | Layout) -> Layout:
        """A layout with `canvas` on both sides; a Layout is returned as it is. TypeError for anything else."""
        if isinstance(canvas, Layout):
            return canvas
        if not isinstance(canvas, Canvas):
            raise TypeError(f"canvas={canvas!r} is a {type(canvas).__name__}; legal: a Canvas, such as Canvas((8, 8)).")
        return Layout(canvas, canvas)

    @property
    def nq(self) -> int:
        """Queries present."""
        return self.q.size - self.q_start if self.q_tokens is None else self.q_tokens

    @property
    def nk(self) -> int:
        """Keys present."""
        return self.kv.size - self.kv_start if self.kv_tokens is None else self.kv_tokens

    @property
    def key(self) -> tuple:
        """What plans depend on; hashable."""
        starts = (self.q_start, self.kv_start, self.nq, self.nk)
        return (self.q, self.kv, tuple(sorted(self.policy.items())), starts)

    def rule(self, q_part: str, k_part: str) -> Policy:
        """Policy for a pair of part names; the most specific entry wins, queries before keys."""
        for pair in ((q_part, k_part), (q_part, "*"), ("*", k_part), ("*", "*")):
            if pair in self.policy:
                return self.policy[pair]
        return "all"

    def inside(self, q_part: int, k_part: int) -> bool:
        """Whether part numbers of the two sides are the same grid."""
        q, k = self.q.parts[q_part], self.kv.parts[k_part]
        return q.is_grid and k.is_grid and q.name == k.name

    def q_coords(self, index: Tensor | None = None, device: torch.device | str | None = None) -> Coords:
        """Canvas coordinates of the present queries `index` (counted from `q_start`; default all)."""
        place = torch.arange(self.nq, device="cpu") if index is None else index
        return self.q.coords(place + self.q_start, device)

    def kv_coords(self, index: Tensor | None = None, device: torch.device | str | None = None) -> Coords:
        """Canvas coordinates of the present keys `index` (counted from `kv_start`; default all)."""
        place = torch.arange(self.nk, device="cpu") if index is None else index
        return self.kv.coords(place + self.kv_start, device)

    def outside(self, q: Coords, k: Coords) -> Tensor:
        """What the policy says about each (broadcast) pair, bool."""
        kinds = {"none": 0, "all": 1, "causal": 2}
        table = torch.tensor(
            [[kinds[self.rule(a.name, b.name)] for b in self.kv.parts] for a in self.q.parts], device=q.part.device
        )
        rule = table[q.part, k.part]
        return (rule == 1) | ((rule == 2) & (k.index <= q.index))

    def segments(self, batch: int, device: torch.device | str) -> tuple[Tensor, Tensor] | None:
        """Document number of every query and key, int32 [B, Nq] and [B, Nk], -1 for padding; None if all is one."""
        if not self.lengths and self.documents is None:
            return None
        sides = []
        given = self.documents if isinstance(self.documents, tuple) else (self.documents, self.documents)
        for canvas, start, count, documents in (
            (self.q, self.q_start, self.nq, given[0]),
            (self.kv, self.kv_start, self.nk, given[1]),
        ):
            if documents is None:
                ids = torch.zeros(batch, canvas.size, dtype=torch.int32, device=device)
            else:
                ids = documents.to(device=device, dtype=torch.int32)
                if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != canvas.size:
                    raise ValueError(
                        f"Layout: documents of shape {tuple(ids.shape)} must be [{batch}, {canvas.size}] for "
                        f"{canvas!r}."
                    )
                ids = ids.expand(batch, -1).clone()
            for name, lengths in self.lengths.items():
                if name not in {p.name for p in canvas.parts}:
                    continue
                if lengths.numel() not in (1, batch):
                    raise ValueError(
                        f"Layout: lengths[{name!r}] has {lengths.numel()} entries; legal: {batch}, one a sample, or 1."
                    )
                index = canvas.indices(name).to(device)  # [n]
                valid = torch.arange(index.numel(), device=device)[None] < lengths.to(device).reshape(-1, 1)
                ids[:, index] = torch.where(valid, ids[:, index], -1)
            sides.append(ids[:, start : start + count].contiguous())
        return sides[0], sides[1]
