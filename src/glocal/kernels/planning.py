"""Puts the Triton kernels of planning in the place of the plain ones on CUDA; Triton is imported on the first call."""

from __future__ import annotations

from torch import Tensor

from glocal.kernels.capability import installed
from glocal.plan import lists


def register() -> None:
    """Once, where Triton is installed; without it CUDA runs the plain ones too."""
    if not installed("triton"):
        return
    lists.compact.register_kernel("cuda")(_compact)
    lists.compact_columns.register_kernel("cuda")(_compact_columns)
    lists.rising.register_kernel("cuda")(_rising)


def _compact(picked: Tensor, most: int) -> tuple[Tensor, Tensor]:
    from glocal.kernels.triton import planning

    return planning.compact(picked, most)


def _compact_columns(picked: Tensor) -> tuple[Tensor, Tensor]:
    from glocal.kernels.triton import planning

    return planning.compact_columns(picked)


def _rising(index: Tensor, count: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    from glocal.kernels.triton import planning

    return planning.rising(index, count, columns)
