"""Puts Triton kernels in the place of what routers of blocks do in plain torch on CUDA; Triton is imported on the first
call.
"""

from __future__ import annotations

from torch import Tensor

from glocal.kernels.capability import installed
from glocal.routing import keep, shares
from glocal.routing.partition import Partition


def register() -> None:
    """Once, where Triton is installed; without it CUDA runs the plain ones too."""
    if not installed("triton"):
        return
    shares.group_stats.register_kernel("cuda")(_group_stats)
    keep.by_mass.register_kernel("cuda")(_by_mass)


def _group_stats(x: Tensor, members: Tensor, whole: bool, spread: bool) -> tuple[Tensor, Tensor]:
    from glocal.kernels.triton import groups

    if not groups.holds(members.shape[1], x.shape[3]):
        return shares.plain_stats(x, Partition(members[None, None], "groups"), whole, spread)
    return groups.group_stats(x, members, whole, spread)


def _by_mass(scores: Tensor, mass: float, first: int, least: int) -> Tensor:
    from glocal.kernels.triton import groups

    if scores.shape[-1] > groups.WIDE:
        return keep.plain_by_mass(scores, mass, first, least)
    return groups.by_mass(scores, mass, first, least)
