"""A depthwise convolution whose kernel the input makes: one for each sample and channel (InLine, arXiv 2412.06590)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import maps


def dynamic_conv(x: Tensor, kernels: Tensor) -> Tensor:
    """Cross-correlation of x: [B, H, W, C] with kernels: [B, C, h, w], odd sides, zeros around the map -> like x.

    Shifted copies of the map are weighted and summed; a compiled graph fuses them, and on a GPU, in eager calls, one
    kernel reads the map where it lies. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 4 or kernels.shape[:2] != (x.shape[0], x.shape[3]) or kernels.dim() != 4:
        raise ValueError(
            f"dynamic_conv: kernels of shape {tuple(kernels.shape)} must be [{x.shape[0]} samples, {x.shape[-1]} "
            f"channels, h, w] for x of shape {tuple(x.shape)}."
        )
    down, across = kernels.shape[2:]
    if down % 2 == 0 or across % 2 == 0:
        raise ValueError(f"dynamic_conv: kernels of {down} x {across} must have odd sides.")
    if maps.usable(x, kernels):
        from glocal.kernels.maps.dynamic import DynamicConv

        return DynamicConv.apply(x, kernels)  # type: ignore[no-any-return]
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, across // 2, across // 2, down // 2, down // 2))
    weights = kernels.permute(2, 3, 0, 1)[:, :, :, None, None]  # [h, w, B, 1, 1, C]
    out = padded[:, :height, :width] * weights[0, 0]
    for place in range(1, down * across):
        y, z = divmod(place, across)
        out = out + padded[:, y : y + height, z : z + width] * weights[y, z]
    return out
