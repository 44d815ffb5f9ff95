"""Oracles: attention in float64 over a boolean relation, and who-sees-whom rules as plain Python loops.

Nothing here imports the rest of the library, so an error there cannot hide here. Everything is quadratic in the tokens
and slow; use it on small cases. The rules are those of the papers named at each function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

import torch
from torch import Tensor

See = Callable[[int, int], bool]


@dataclass(frozen=True, eq=False)
class Attended:
    """out: [B, Hq, Nq, Dv] and its natural-log normaliser lse: [B, Hq, Nq], float64, differentiable."""

    out: Tensor
    lse: Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Attended:
    """Attention in float64 with plain autograd.

    q: [B, Hq, Nq, D]; k, v: [B, Hkv, Nk, D | Dv]; seen: bool, or how often a key counts, broadcasting to
    [B, Hq, Nq, Nk], or [Hkv, Nq, Nk]; scale: default D ** -0.5; bias: added to the scaled logits.
    A row that sees nothing is 0 with lse -inf.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    if seen is None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if seen.dim() == 3 and seen.shape[0] == k.shape[1] and groups > 1:
        seen = torch.stack([seen[h // groups] for h in range(q.shape[1])])
    counts = seen.double().expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    k = torch.stack([k[:, h // groups] for h in range(q.shape[1])], 1)  # [B, Hq, Nk, D]
    v = torch.stack([v[:, h // groups] for h in range(q.shape[1])], 1)
    used = (counts > 0).any(2)[..., None]
    k, v = k.masked_fill(~used, 0), v.masked_fill(~used, 0)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.double()
    logits = torch.where(counts > 0, logits + counts.clamp(min=1).log(), -torch.inf)
    blind = ~(counts > 0).any(-1)
    lse = torch.logsumexp(torch.where(blind[..., None], 0.0, logits), -1)
    weights = torch.exp(logits - lse[..., None]).masked_fill(blind[..., None], 0)
    return Attended(weights @ v, lse.masked_fill(blind, -torch.inf))


def relation(q_shape: Sequence[int], k_shape: Sequence[int], sees: Callable[[tuple, tuple], bool]) -> Tensor:
    """Bool [Nq, Nk]: `sees` asked for every pair of grid coordinates, both in raster order."""
    keys = list(product(*map(range, k_shape)))
    rows = [[bool(sees(a, b)) for b in keys] for a in product(*map(range, q_shape))]
    return torch.tensor(rows, dtype=torch.bool).reshape(prod(q_shape), prod(k_shape))


def axiswise(shape: Sequence[int], rules: Sequence[See]) -> Tensor:
    """Bool [N, N]: a pair is seen if the rule of every axis says so."""
    return relation(shape, shape, lambda a, b: all(see(i, j) for see, i, j in zip(rules, a, b, strict=True)))


def neighborhood(length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> See:
    """One axis of neighbourhood attention (arXiv 2504.16922): windows shift at borders, a stride group shares one."""

    def see(i: int, j: int) -> bool:
        group, place = i % dilation, i // dilation
        if j % dilation != group:
            return False
        n = ceil((length - group) / dilation)
        left, right = window // 2, window // 2 + window % 2 - 1
        if causal:
            leader = min(place // stride * stride + stride - 1, n - 1)
            return max(leader - left - right, 0) <= j // dilation < min(place + 1, n)
        leader = min(place // stride * stride + stride // 2, n - 1)
        start = max(leader - left, 0)
        if leader + right >= n:
            start += n - 1 - right - leader
        return start <= j // dilation < start + window

    return see


def clipped(before: int, after: int) -> See:
    """One axis of a window that borders cut: keys from `before` tokens back to `after` tokens ahead."""
    return lambda i, j: -before <= j - i <= after


def windowed(size: int) -> See:
    """One axis cut into windows of `size` tokens."""
    return lambda i, j: i // size == j // size


def strided_shard(
    block: int, local: int, stride: int, query_heads: int, head: int, offset: int = 0
) -> Callable[[tuple, tuple], bool]:
    """Key head `head` of causal S2-Attention (arXiv 2407.17678): a window of blocks and one class of far blocks."""
    step = max(1, int(stride / query_heads))

    def see(a: tuple, b: tuple) -> bool:
        i, j = a[0] // block, b[0] // block
        near, far = i - j < local, (j + head * step + offset) % stride == 0
        return b[0] <= a[0] and (near or far)

    return see


def radial_blocks(frames: int, tokens: int, block: int, decay: float, sink: bool, text: int = 0) -> Tensor:
    """Block mask of Radial Attention's published code (arXiv 2506.19852), bool [blocks, blocks]."""
    total, side = frames * tokens + text, ceil(tokens / block)
    count = ceil(total / block)
    mask = torch.zeros(count, count, dtype=torch.bool)
    for i, j in product(range(frames), repeat=2):
        gap = abs(i - j)
        share = 2 ** tokens.bit_length() / 2 ** gap.bit_length()
        width = tokens if gap <= 1 else max(share * decay, block)
        if not (sink and j == 0) and not (share >= 128 or gap % int(128 / share) == 0):
            continue
        top, left = i * tokens % block, j * tokens % block
        room = torch.zeros(top + side * block, left + side * block, dtype=torch.bool)
        for k, l in product(range(tokens), repeat=2):
            room[top + k, left + l] = (sink and j == 0) or abs(k - l) <= width
        for r, c in product(range(side), repeat=2):
            cell = room[r * block : (r + 1) * block, c * block : (c + 1) * block]
            dense = int((cell.double().mean(0) > 1 / 3).sum())
            some = int(cell.any(0).sum())
            row, column = i * tokens // block + r, j * tokens // block + c
            if dense / (some + 1e-9) > 0.6 and row < count and column < count:
                mask[row, column] = True
    first = frames * tokens // block
    mask[first:], mask[:, first:] = True, True
    return mask
