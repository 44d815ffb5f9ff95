"""Norms over channels-last maps: layer norm (arXiv 1607.06450), and batch norm with its activation in evaluation.

On a GPU, in eager calls, they are kernels of one pass.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import maps

Activation = Literal["none", "gelu", "gelu_tanh"]
_MOST = 8192  # channels of a row that the kernel takes


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """x: [..., C], weight, bias: [C] -> (x - mean) / sqrt(variance + eps) * weight + bias, of x's shape."""
    if maps.autocasts(x):  # to float32, in which the result stays
        with torch.autocast("cuda", enabled=False):
            return layer_norm(x.float(), weight.float(), bias.float(), eps)
    if x.shape[-1] <= _MOST and maps.usable(x, weight, bias):
        from glocal.kernels.maps.norm import LayerNorm, forward

        if not torch.is_grad_enabled():
            return forward(x.contiguous(), weight, bias, eps)[0]
        return LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def stored_norm(
    x: Tensor, stats: tuple[Tensor, Tensor, Tensor, Tensor], eps: float = 1e-5, act: Activation = "none"
) -> Tensor:
    """act((x - mean) / sqrt(variance + eps) * weight + bias): batch norm by stored statistics (arXiv 1502.03167).

    x: [..., C]; stats: mean, variance, weight, bias, [C] each. act: "none", "gelu", or its tanh form "gelu_tanh". On a
    GPU, in eager calls without gradients, one kernel. Returns x's shape.
    """
    check_activation("stored_norm", act)
    if not torch.is_grad_enabled() and maps.usable(x, *stats):
        from glocal.kernels.maps.affine import affine

        return affine(x, stats, eps, act)
    mean, variance, weight, bias = stats
    wide = x.flatten(0, -2)
    return activate(F.batch_norm(wide, mean, variance, weight, bias, eps=eps).reshape(x.shape), act)


def check_activation(call: str, act: str) -> None:
    """Raise ValueError for an unknown word."""
    if act not in get_args(Activation):
        raise ValueError(f"{call}: act={act!r}; legal: {', '.join(map(repr, get_args(Activation)))}.")


def activate(x: Tensor, act: Activation) -> Tensor:
    """x through the activation of that name."""
    return x if act == "none" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
