"""Room for results, laid out as what they belong to: a layer whose projection makes q, k and v then copies nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def like(t: Tensor, shape: Sequence[int], *, zero: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Room for [B, H, N, D], the heads of a token side by side where those of t, [B, any, any, any], are."""
    _, h, n, d = shape
    strides = (n * h * d, d, h * d, 1) if t.stride(1) < t.stride(2) else (h * n * d, n * d, d, 1)
    found = t.new_empty_strided(tuple(shape), strides, dtype=dtype or t.dtype)
    return found.zero_() if zero else found


def packed(parts: Sequence[Tensor], *, zero: bool) -> list[Tensor] | None:
    """Room for the gradients of `parts`, side by side as these are; None where they are no parts of one tensor."""
    b, h, n, d = parts[0].shape
    if not side_by_side(parts):
        return None
    whole = parts[0].new_empty(b, n, len(parts), h, d)
    if zero:
        whole.zero_()
    return list(whole.permute(2, 0, 3, 1, 4).unbind())


def side_by_side(parts: Sequence[Tensor]) -> bool:
    """Whether parts [B, H, N, D] are what `[B, N, parts * H * D]` was cut into, and all of it."""
    first = parts[0]
    _, h, n, d = first.shape
    row = len(parts) * h * d
    whole = first.stride() == (n * row, d, row, 1) and first.numel() > 0
    storage = first.untyped_storage()._cdata
    return whole and all(
        t.shape == first.shape
        and t.stride() == first.stride()
        and t.storage_offset() == first.storage_offset() + i * h * d
        and t.untyped_storage()._cdata == storage
        for i, t in enumerate(parts)
    )
