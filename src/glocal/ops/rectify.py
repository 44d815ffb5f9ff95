"""Rectification of block-sparse attention (Rectified SpaAttn, arXiv 2511.19835): the softmax over kept keys is scaled
by the mass they would have in full attention, and dropped blocks that their means stand for come back as mean values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glocal._exact import exact
from glocal.ops.epilogue import Epilogue, GroupEpilogue
from glocal.routing.partition import Partition
from glocal.routing.shares import Shares


def rectification(share: Shares, kept: Tensor, helpful: Tensor, v_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Factor [B, H, query groups] and addend [B, H, query groups, Dv] of each query block.

    kept: blocks that attention reads; helpful: blocks whose mean may stand for them; both bool [B, H, query groups, key
    groups]. v_mean: mean values [B, H, key groups, Dv]. Mass of dropped blocks that are not helpful stays with the kept
    ones.
    """
    replaced = helpful & ~kept
    gone = torch.where(replaced, share.blocks, 0)
    with exact(gone):
        return 1 - gone.sum(-1), gone @ v_mean.to(gone.dtype)


def spread(
    part: Partition, tokens: int, factor: Tensor, addend: Tensor, dtype: torch.dtype
) -> Epilogue | GroupEpilogue:
    """The epilogue of all tokens; groups behind those of `factor` (text) keep their output.

    part: groups of all queries; factor, addend: of its first groups.
    """
    rest = part.groups - factor.shape[2]
    factor = torch.nn.functional.pad(factor, (0, rest), value=1.0)
    addend = torch.nn.functional.pad(addend, (0, 0, 0, rest))
    return Epilogue.of_groups(part, tokens, factor, addend.to(dtype))
