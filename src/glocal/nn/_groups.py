"""Dense attention inside many small groups, by torch's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_GRID = 65_535  # the end of a grid axis of CUDA: groups a launch of FlashAttention, groups times heads of cuDNN
_FEW = 128  # keys of a group up to which cuDNN is left out
_ENGINES = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` of q [G, heads, n, d], k and v [G, heads, m, d], for any number G of groups.

    On a GPU small groups go past cuDNN, which compiles for a second at every new shape, and more groups than one launch
    can count are taken in turn.
    """
    if not q.is_cuda or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    if q.shape[0] > _GRID:
        parts = zip(q.split(_GRID), k.split(_GRID), v.split(_GRID), strict=True)
        pieces = [
            attend_groups(a, b, c, _piece(mask, i), dropout=dropout, scale=scale) for i, (a, b, c) in enumerate(parts)
        ]
        return torch.cat(pieces)
    if k.shape[2] > _FEW and q.shape[0] * q.shape[1] <= _GRID:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    with sdpa_kernel(_ENGINES):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def _piece(mask: Tensor | None, index: int) -> Tensor | None:
    """Of a mask [G | 1, ...]."""
    return mask if mask is None or mask.shape[0] == 1 else mask.split(_GRID)[index]
