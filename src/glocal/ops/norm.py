"""Layer norm over the last axis (arXiv 1607.06450); on a GPU, in eager calls, by a kernel for rows of few channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import maps

_MOST = 8192  # channels of a row that the kernel takes


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """x: [..., C], weight, bias: [C] -> (x - mean) / sqrt(variance + eps) * weight + bias, of x's shape."""
    if x.shape[-1] <= _MOST and maps.usable(x, weight, bias):
        from glocal.kernels.maps.norm import LayerNorm

        return LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]
    return F.layer_norm(x, weight.shape, weight, bias, eps)
