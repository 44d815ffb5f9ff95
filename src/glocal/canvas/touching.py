"""Which blocks of an order touch in space: some token of the one is a neighbour (diagonals count) of some token of the
other. Rectified SpaAttn (arXiv 2511.19835) keeps these blocks whatever their score.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def touching_blocks(order: Tensor, shape: Sequence[int], block: int) -> Tensor:
    """Bool [blocks, blocks], symmetric, every block touches itself.

    order: raster index at every place, int64 [tokens], each token once. shape: axes of the grid. block: places a block.
    """
    shape = tuple(shape)
    blocks = -(-order.numel() // block)
    label = torch.empty_like(order)
    label[order] = torch.arange(order.numel(), device=order.device) // block
    grid = label.reshape(shape)
    table = torch.eye(blocks, dtype=torch.bool, device=order.device)
    for step in product((-1, 0, 1), repeat=len(shape)):
        if step <= (0,) * len(shape):
            continue  # the opposite step sees the same pairs
        here = grid[tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, shape, strict=True))]
        there = grid[tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, shape, strict=True))]
        table[here.flatten(), there.flatten()] = True
    return table | table.T
