"""Cells of pixels and their centres: soft assignment of every pixel to the centres around its cell.

A map is cut into cells with one centre each. A pixel is related to the centres of its own and the neighbouring cells
alone: `affinity` forms the weights from dot products, `gather` reads centres, `scatter` is the adjoint of `gather` and
averages pixels into centres (super tokens, arXiv 2211.11167). Cost is linear in the pixels.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal._exact import exact

Border = Literal["absent", "mask"]


def affinity(pixels: Tensor, centres: Tensor, scale: float, *, reach: int = 1, border: Border = "absent") -> Tensor:
    """Softmax over neighbouring centres of scale * pixel . centre.

    pixels: [B, rows, columns, P, C], the pixels of each cell. centres: [B, rows, columns, C]. reach: cells either way.
    border: a neighbour outside the grid counts with logit 0 and takes its share ("absent"), or not at all ("mask").

    Returns [B, rows, columns, P, K], K = (2 reach + 1) ** 2 neighbours row by row, float32 (float64 for float64).
    """
    _check(pixels, centres, reach)
    if border not in get_args(Border):
        raise ValueError(f"affinity: border={border!r}; legal: 'absent', 'mask'.")
    high = torch.float64 if pixels.dtype == torch.float64 else torch.float32
    around = _neighbours(centres.to(high), reach)  # [B, rows, columns, K, C]
    with exact(pixels):
        logits = pixels.to(high) @ around.transpose(-1, -2) * scale
    if border == "mask":
        there = _neighbours(torch.ones_like(centres[:1, ..., :1], dtype=high), reach)[..., 0]  # [1, rows, columns, K]
        logits = logits.masked_fill(there[..., None, :] == 0, -torch.inf)
    return logits.softmax(-1)


def gather(centres: Tensor, weights: Tensor) -> Tensor:
    """Each pixel's weighted sum of the centres around it; centres outside the grid are zero.

    centres: [B, rows, columns, C]. weights: [B, rows, columns, P, K] of `affinity`. Returns [B, rows, columns, P, C].
    """
    return weights.to(centres.dtype) @ _neighbours(centres, _reach(weights))


def scatter(pixels: Tensor, weights: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Each centre's mean of the pixels around it, by weight; what goes to centres outside the grid is lost.

    pixels: [B, rows, columns, P, C]. weights: as in `gather`. eps: added to the weight a centre receives. Sums are
    float32 (float64 for float64). Returns [B, rows, columns, C] in the type of pixels.
    """
    reach = _reach(weights)
    with exact(pixels):
        total = _folded(weights.transpose(-1, -2) @ pixels.to(weights.dtype), reach)
    mass = _folded(weights.sum(-2)[..., None], reach)
    return (total / (mass + eps)).to(pixels.dtype)


def _neighbours(centres: Tensor, reach: int) -> Tensor:
    """[B, rows, columns, C] -> [B, rows, columns, K, C], zero outside the grid."""
    rows, columns = centres.shape[1:3]
    padded = F.pad(centres, (0, 0, reach, reach, reach, reach))
    side = 2 * reach + 1
    return torch.stack([padded[:, y : y + rows, x : x + columns] for y in range(side) for x in range(side)], 3)


def _folded(parts: Tensor, reach: int) -> Tensor:
    """The adjoint of `_neighbours`: [B, rows, columns, K, C] -> [B, rows, columns, C]."""
    far = 2 * reach
    slots = parts.unbind(3)
    total = F.pad(slots[0], (0, 0, 0, far, 0, far))
    for number, slot in enumerate(slots[1:], 1):
        y, x = divmod(number, far + 1)
        total = total + F.pad(slot, (0, 0, x, far - x, y, far - y))
    return total[:, reach : reach + parts.shape[1], reach : reach + parts.shape[2]]


def _reach(weights: Tensor) -> int:
    side = round(weights.shape[-1] ** 0.5)
    if weights.dim() != 5 or side * side != weights.shape[-1] or side % 2 == 0:
        raise ValueError(
            f"cells: weights of shape {tuple(weights.shape)} must be [B, rows, columns, pixels, neighbours], with 9, "
            f"25, ... neighbours."
        )
    return side // 2


def _check(pixels: Tensor, centres: Tensor, reach: int) -> None:
    if pixels.dim() != 5 or centres.shape != (*pixels.shape[:3], pixels.shape[4]):
        raise ValueError(
            f"affinity: pixels of shape {tuple(pixels.shape)} must be [B, rows, columns, pixels, C] and centres of "
            f"shape {tuple(centres.shape)} [B, rows, columns, C]."
        )
    if reach < 0:
        raise ValueError(f"affinity: reach={reach} must be at least 0; published: 1.")
