"""Kernels of vision backbones over channels-last maps, in Triton: norms, depthwise convolution, products over tokens.

torch's own kernels for these are 2 to 6 times away from the bandwidth of a GPU on maps of 64 to 200 channels. They are
for eager calls: a compiled graph fuses the same work itself. Triton is imported on the first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.kernels.capability import installed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton() -> bool:
    return installed("triton")


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors here and now: eager, on CUDA, one dtype that they know, no autocast."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    given = [t for t in tensors if t is not None]
    first = given[0].dtype
    right = all(t.is_cuda and t.dtype == first and t.numel() > 0 for t in given)
    return right and first in _DTYPES and _triton()


def autocasts(x: Tensor) -> bool:
    """Whether autocast changes the types of an eager call on x here: operators cast as it does, then go on without."""
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled("cuda"):
        return False
    return x.is_cuda and x.dtype in _DTYPES


def power(size: int, least: int = 1) -> int:
    """The smallest power of two from `size` and `least` on."""
    return max(least, 1 << max(size - 1, 0).bit_length())
