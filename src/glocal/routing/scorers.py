"""Scores between groups of queries and groups of keys, always in float32: ties of bfloat16 would prefer low indices.

`BlockMean` is the pooled score of most block-sparse methods (BiFormer, arXiv 2303.08810; Rectified SpaAttn, arXiv
2511.19835; HeSS, arXiv 2603.25336); `MeanToToken` looks at single keys (arXiv 2406.10774 uses bounds of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from glocal.routing.partition import Partition
from glocal.routing.shares import means

Combine = Literal["none", "sum", "mean"]


class Scorer(Protocol):
    """Gives every pair of groups a score, float32 (float64 for float64) [B, Hq|1, query groups, key groups]."""

    def __call__(self, q: Tensor, k: Tensor, q_part: Partition, kv_part: Partition) -> Tensor:
        """q [B, Hq, Nq, D], k [B, Hkv, Nk, D]; empty key groups score -inf."""
        ...


@dataclass(frozen=True)
class BlockMean:
    """scale * mean(q of the group) . mean(k of the group).

    combine: over heads, "none" (a score for each query head), "sum" of the dot products (one long vector, BiFormer),
        or "mean" of the vectors. scale: None is head_dim ** -0.5.
    """

    combine: Combine = "none"
    scale: float | None = None

    def __post_init__(self) -> None:
        check_combine(self.combine)

    def __call__(self, q: Tensor, k: Tensor, q_part: Partition, kv_part: Partition) -> Tensor:
        """Scores [B, Hq|1, query groups, key groups]."""
        mine, theirs = _mean(q_part, q), _mean(kv_part, heads_like(k, q))  # [B, Hq, groups, D]
        scores = combined(mine, theirs, self.combine, self.scale)
        return scores.masked_fill(kv_part.counts.to(q.device)[:, :, None] == 0, -torch.inf)


@dataclass(frozen=True)
class MeanToToken:
    """scale * mean(q of the group) . k for every key, reduced over the keys of a group.

    reduce: "logsumexp" (the group's share of the mass that the mean query gives) or "max" (its best key).
    combine, scale: as in `BlockMean`. Memory: query groups x keys, in chunks of query groups.
    """

    reduce: Literal["logsumexp", "max"] = "logsumexp"
    combine: Combine = "none"
    scale: float | None = None
    chunk: int = 64

    def __post_init__(self) -> None:
        check_combine(self.combine)
        if self.reduce not in ("logsumexp", "max"):
            raise ValueError(f"MeanToToken: reduce={self.reduce!r}; legal: 'logsumexp', 'max'.")

    def __call__(self, q: Tensor, k: Tensor, q_part: Partition, kv_part: Partition) -> Tensor:
        """Scores [B, Hq|1, query groups, key groups]."""
        mine, theirs = _mean(q_part, q), heads_like(k, q).to(high(q))
        out = []
        for rows in mine.split(self.chunk, 2):
            tokens = combined(rows, theirs, self.combine, self.scale)  # [B, Hq|1, chunk, Nk]
            groups = kv_part.gather(tokens.transpose(2, 3), fill=-torch.inf)  # [B, Hq|1, key groups, most, chunk]
            found = groups.logsumexp(-2) if self.reduce == "logsumexp" else groups.amax(-2)
            out.append(found.transpose(2, 3))
        return torch.cat(out, 2)


def _mean(part: Partition, x: Tensor) -> Tensor:
    """Means of the groups; on a GPU without a copy of x in float32 where no gradient is asked for."""
    plain = not x.is_cuda or (torch.is_grad_enabled() and x.requires_grad)
    return part.mean(x) if plain or not part.shared else means(x, part)


def high(x: Tensor) -> torch.dtype:
    """The type scores are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def heads_like(k: Tensor, q: Tensor) -> Tensor:
    """Keys with a head for every query head: [B, Hkv, N, D] to [B, Hq, N, D]."""
    if k.shape[1] == q.shape[1]:
        return k
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"route: {q.shape[1]} query heads do not divide over {k.shape[1]} key heads.")
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def combined(a: Tensor, b: Tensor, combine: Combine, scale: float | None) -> Tensor:
    """scale * a . b over the last axis, [B, H|1, rows of a, rows of b]; heads combined as asked."""
    factor = a.shape[-1] ** -0.5 if scale is None else scale
    if combine == "mean":
        a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    scores = (a * factor) @ b.transpose(-1, -2)
    return scores.sum(1, keepdim=True) if combine == "sum" else scores


def check_combine(combine: str) -> None:
    """ValueError if `combine` is none of the three."""
    if combine not in ("none", "sum", "mean"):
        raise ValueError(f"combine={combine!r}; legal: 'none', 'sum' (of dot products), 'mean' (of vectors).")
