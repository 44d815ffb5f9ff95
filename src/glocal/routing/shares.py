"""How the mass of a query block spreads over key blocks and single words, judged by block means; and where a dropped
block may be replaced by its mean (Rectified SpaAttn, arXiv 2511.19835, sections on IPAR and GAPR).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from glocal._exact import exact
from glocal.routing.partition import Partition

Tail = Literal["count", "block"]


@dataclass(frozen=True, eq=False)
class Pooled:
    """Block means and how far tokens lie from them, float32 (float64 for float64).

    mean, spread: [B, H, groups, D]; spread is the mean absolute deviation of each channel. counts: tokens of each
    block, [groups].
    """

    mean: Tensor
    spread: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Shares:
    """Shares of the mass that a row of block means gives, summing to one.

    blocks: [B, H, query groups, key groups]. words: [B, H, query groups], of all single keys together; 0 without any.
    logits: what they are the softmax of, [B, H, query groups, key groups], with the words as a last column if there are
    any. To rank by them tells apart what underflows to a share of 0.
    """

    blocks: Tensor
    words: Tensor
    logits: Tensor


def pooled(x: Tensor, part: Partition, tail: Tail = "count") -> Pooled:
    """Means of the groups of x [B, H, N, D] and the spread around them.

    part: groups that all heads and samples share. tail: a group with pads is averaged over its tokens ("count") or, as
    published, over a whole block whose missing tokens are zero ("block").
    """
    mean, spread = _stats(x, part, tail, True)
    real = part.counts[0, 0].to(x.device)
    return Pooled(mean, spread, torch.full_like(real, part.most) if tail == "block" else real)


def means(x: Tensor, part: Partition, tail: Tail = "count") -> Tensor:
    """The means of `pooled` alone, [B, H, groups, D]."""
    return _stats(x, part, tail, False)[0]


def _stats(x: Tensor, part: Partition, tail: Tail, spread: bool) -> tuple[Tensor, Tensor]:
    if not part.shared:
        raise ValueError(f"pooled: {part!r} differs by head or sample; legal: groups that all share.")
    if x.is_cuda and x.dtype != torch.float64 and not (torch.is_grad_enabled() and x.requires_grad):
        return group_stats(x, part.members[0, 0].to(x.device), tail == "block", spread)
    return plain_stats(x, part, tail == "block" or _whole(part), spread)


@torch.library.custom_op("glocal::group_stats", mutates_args=())
def group_stats(x: Tensor, members: Tensor, whole: bool, spread: bool) -> tuple[Tensor, Tensor]:
    """Mean of each group of x [B, H, N, D] and mean absolute deviation from it, float32 [B, H, groups, D]; the second
    one is empty unless `spread`. members: int32 [groups, most], -1 pads. whole: pads count as tokens of zero.

    Forward only; on CUDA `glocal.ops` puts a Triton kernel in its place.
    """
    return plain_stats(x, Partition(members[None, None], "groups"), whole, spread)


@group_stats.register_fake
def _(x: Tensor, members: Tensor, whole: bool, spread: bool) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(*x.shape[:2], members.shape[0], x.shape[3], dtype=torch.float32)
    return mean, torch.empty_like(mean) if spread else mean.new_empty(0)


def plain_stats(x: Tensor, part: Partition, whole: bool, spread: bool) -> tuple[Tensor, Tensor]:
    """`group_stats` in plain torch, float64 for float64, differentiable."""
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = _groups(x, part)  # [B, H, groups, most, D]
    live = (part.members[0, 0] >= 0).to(x.device)[..., None] | whole  # [groups, most, 1]
    count = live.sum(1).clamp(min=1).to(high)  # [groups, 1]
    mean = groups.sum(-2, dtype=high) / count
    if not spread:
        return mean, mean.new_empty(0)
    far = torch.where(live, (groups - mean[..., None, :].to(x.dtype)).abs(), 0)
    return mean, far.sum(-2, dtype=high) / count


def _groups(x: Tensor, part: Partition) -> Tensor:
    """The tokens of each group; a view where the groups are consecutive runs."""
    if _consecutive(part):
        members = part.members[0, 0]
        return x[:, :, : members.numel()].unflatten(2, members.shape)
    return part.gather(x)


@lru_cache(maxsize=64)
def _whole(part: Partition) -> bool:
    """Whether no group has pads (one wait for the device)."""
    return bool((part.members >= 0).all())


@lru_cache(maxsize=64)
def _consecutive(part: Partition) -> bool:
    """Whether the groups are runs of tokens from the first one on (one wait for the device)."""
    flat = part.members.flatten()
    return bool((flat == torch.arange(flat.numel(), device=flat.device)).all())


def shares(q: Pooled, k: Pooled, words: Tensor | None = None, scale: float | None = None) -> Shares:
    """Reallocated shares: a softmax over key means and single words, in which a mean counts once for each of its keys.

    words: keys [B, H, W, D] that are not pooled; hidden ones are marked by NaN in their first channel. scale: of the
    logits, None for D ** -0.5.
    """
    mean = q.mean * (q.mean.shape[-1] ** -0.5 if scale is None else scale)
    with exact(mean):
        logits = mean @ k.mean.transpose(-1, -2) + k.counts.to(mean.dtype).log()  # [B, H, query groups, key groups]
    if words is None or not words.shape[2]:
        weight = logits.softmax(-1)
        return Shares(weight, weight.new_zeros(weight.shape[:-1]), logits)
    hidden = words[..., 0].isnan()[:, :, None]  # [B, H, 1, W]
    with exact(mean):
        single = mean @ words.nan_to_num().to(mean.dtype).transpose(-1, -2)
    single = single.masked_fill(hidden, -torch.inf)
    logits = torch.cat([logits, single.logsumexp(-1, keepdim=True)], -1)
    weight = logits.softmax(-1)
    return Shares(weight[..., :-1], weight[..., -1], logits)


def helpful(q: Pooled, k: Pooled) -> Tensor:
    """Where the mean of a key block stands for it: gain beats error, bool [B, H, query groups, key groups].

    gain: |mean q . mean k|. error: |spread q . mean k| + |mean q . spread k|, a heuristic and no bound.
    """
    with exact(q.mean):
        gain = (q.mean @ k.mean.transpose(-1, -2)).abs()
        error = (q.spread @ k.mean.transpose(-1, -2)).abs() + (q.mean @ k.spread.transpose(-1, -2)).abs()
    return gain > error
