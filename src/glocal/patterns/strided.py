"""Strided shards: each head keeps a window and one residue class of far blocks (S2-Attention, arXiv 2407.17678).

Together the heads see everything while each does a fraction of the work. Far blocks are picked by absolute position,
so that what a head has stopped using it never needs again and a key-value cache can drop it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.patterns.base import And, Dense, Pattern
from glocal.patterns.blocks import BlockPattern
from glocal.patterns.causal import Causal


@dataclass(frozen=True)
class ShardBlocks(BlockPattern):
    """The block part of `StridedShards` (the same arguments); without the causal triangle inside blocks."""

    q_block: int
    kv_block: int
    local: tuple[int, int]
    vert_stride: int
    query_heads: int
    kv_heads: int
    num_dense_heads: int
    homo_head: bool
    shift: int
    causal: bool
    position: Literal["absolute", "relative"]

    @property
    def heads(self) -> int | None:
        alike = self.position == "relative" and self.num_dense_heads == 0
        return None if self.homo_head or alike or self.kv_heads == 1 else self.kv_heads

    @property
    def step(self) -> int:
        """By how many blocks the shards of consecutive heads differ."""
        return max(1, self.vert_stride // self.query_heads)

    def block_mask(self, layout: Layout) -> Tensor:
        nq, nk = self.blocks(layout)
        i, j = torch.arange(nq)[:, None], torch.arange(nk)[None]
        before, after = i - j, j - i
        near = (before < self.local[0]) & (after < self.local[1])
        masks = []
        for head in range(1 if self.heads is None else self.heads):
            if head >= self.kv_heads - self.num_dense_heads and not self.homo_head:
                seen = torch.ones(nq, nk, dtype=torch.bool)
            elif self.position == "relative":
                far = (before - self.local[0] + 1).clamp(min=0) + (after - self.local[1] + 1).clamp(min=0)
                seen = far % self.vert_stride == 0
            else:
                seen = near | ((j + head * self.step + self.shift) % self.vert_stride == 0)
            masks.append(seen & (j <= i) if self.causal else seen)
        return torch.stack(masks)


@dataclass(frozen=True)
class StridedShards(And):
    """S2-Attention on a sequence of one grid part ``Canvas((tokens,))``; the pattern of key head h.

    Causal: query block i sees block j <= i if i - j < local_blocks (the own block counts), or if
    (j + h * step + head_sliding_offset) % vert_stride == 0 with step = max(1, vert_stride // heads); inside the
    diagonal block nobody sees a later token. Bidirectional, position "relative": far blocks are counted from the edge
    of the window, without a shift by head; "absolute": as causal, without the triangle.

    block_size: tokens of a block.
    local_blocks: size of the window; bidirectional also (left, right), an int means both.
    heads_q: query heads (only `step` depends on them). num_kv_heads: key heads, each with a pattern of its own that
        the query heads of its group share; None means as many as query heads.
    num_dense_heads: so many of the last key heads see everything. homo_head: all heads use the pattern of head 0.
    position: "absolute", "relative", or None for the published default (absolute if causal, else relative).

    A chunk of a prompt or a decode step is a Layout with q_start and kv_start. ``vert_stride=1`` is dense.
    """

    a: Pattern = field(init=False, repr=False, compare=False)
    b: Pattern = field(init=False, repr=False, compare=False)
    block_size: int
    local_blocks: int | tuple[int, int]
    vert_stride: int
    heads_q: int
    num_kv_heads: int | None = None
    num_dense_heads: int = 0
    homo_head: bool = False
    head_sliding_offset: int = 0
    causal: bool = True
    position: Literal["absolute", "relative"] | None = None

    def __post_init__(self) -> None:
        kv_heads = self.heads_q if self.num_kv_heads is None else self.num_kv_heads
        self._refuse(kv_heads)
        position = self.position
        if position is None:
            position = "absolute" if self.causal else "relative"
        local = self.local_blocks
        blocks = ShardBlocks(
            q_block=self.block_size,
            kv_block=self.block_size,
            local=(local, local) if isinstance(local, int) else local,
            vert_stride=self.vert_stride,
            query_heads=self.heads_q,
            kv_heads=kv_heads,
            num_dense_heads=self.num_dense_heads,
            homo_head=self.homo_head,
            shift=self.head_sliding_offset,
            causal=self.causal,
            position=position,
        )
        object.__setattr__(self, "a", blocks)
        object.__setattr__(self, "b", Causal() if self.causal else Dense())

    def _refuse(self, kv_heads: int) -> None:
        if isinstance(self.local_blocks, list):
            object.__setattr__(self, "local_blocks", tuple(self.local_blocks))
        least = self.local_blocks if isinstance(self.local_blocks, int) else min(self.local_blocks)
        for name, value in (
            ("block_size", self.block_size),
            ("local_blocks", least),
            ("vert_stride", self.vert_stride),
        ):
            if value < 1:
                raise ValueError(f"StridedShards: {name}={getattr(self, name)!r} must be at least 1.")
        if self.heads_q < 1 or kv_heads < 1 or self.heads_q % kv_heads:
            legal = [n for n in range(1, self.heads_q + 1) if self.heads_q % n == 0]
            raise ValueError(
                f"StridedShards: num_kv_heads={self.num_kv_heads} must divide heads_q={self.heads_q}; legal: {legal}."
            )
        if not 0 <= self.num_dense_heads <= kv_heads:
            raise ValueError(f"StridedShards: num_dense_heads={self.num_dense_heads} must lie in 0..{kv_heads}.")
        if self.homo_head and self.num_dense_heads:
            raise ValueError(
                f"StridedShards: num_dense_heads={self.num_dense_heads} with homo_head=True; heads that are all alike "
                f"cannot hold dense ones: use num_dense_heads=0."
            )
        if self.position not in (None, "absolute", "relative") or (self.causal and self.position == "relative"):
            raise ValueError(
                f"StridedShards: position={self.position!r} with causal={self.causal}; legal: 'absolute', or "
                f"'relative' with causal=False."
            )

    @property
    def key(self) -> tuple:
        """What identifies the pattern."""
        return ("StridedShards", self.a, self.causal)

    @property
    def shards(self) -> ShardBlocks:
        """The block part."""
        assert isinstance(self.a, ShardBlocks)
        return self.a

    def check(self, layout: Layout) -> None:
        for side, canvas in (("queries", layout.q), ("keys", layout.kv)):
            if len(canvas.parts) != 1 or not canvas.parts[0].is_grid or len(canvas.parts[0].axes) != 1:
                raise ValueError(
                    f"StridedShards: {canvas!r} for {side}; it needs one sequence of tokens, such as "
                    f"Canvas(({canvas.size},))."
                )
        super().check(layout)

    def covers(self, tokens: int) -> bool:
        """Whether the heads together see every (causally legal) block of a sequence; warns if they do not."""
        n = -(-tokens // self.block_size)
        mask = self.shards.block_mask(Layout.of(Canvas((n * self.block_size,))))
        union = mask.any(0)
        legal = torch.ones(n, n, dtype=torch.bool)
        missing = int((~union & (legal.tril() if self.causal else legal)).sum())
        if missing:
            sparse = self.shards.kv_heads - self.num_dense_heads
            warnings.warn(
                f"StridedShards: no head sees {missing} of the blocks of {tokens} tokens: {sparse} sparse heads cannot "
                f"cover vert_stride={self.vert_stride}. Use at least {self.vert_stride} key heads, a "
                f"smaller stride, or a dense head.",
                stacklevel=2,
            )
        return missing == 0


def cache_efficient(mask: Tensor, q_first: int = 0) -> bool:
    """Whether what a head stops using stays unused: no past block turns visible when the query block advances.

    mask: bool [heads, query blocks, key blocks]; q_first: key-block number of the first query block.
    """
    i = torch.arange(mask.shape[1] - 1)[:, None] + q_first
    past = torch.arange(mask.shape[2])[None] < i  # strictly before both query blocks
    return not bool((~mask[:, :-1] & mask[:, 1:] & past).any())
