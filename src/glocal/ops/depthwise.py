"""Depthwise convolution of channels-last maps; on a GPU, in eager calls, with bias and residual in one kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import maps


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    residual: bool = False,
) -> Tensor:
    """Each channel with a square kernel of its own.

    x: [B, H, W, C]; weight: [C, 1, K, K]; bias: [C] or None; padding: zeros at the top, bottom, left and right.
    residual: x is added, which needs a result of its size. Returns [B, h, w, C] with h = (H + top + bottom - K) //
    stride + 1. Raises ValueError for other weights, a map below the kernel, or a residual that does not fit.
    """
    top, bottom, left, right = padding
    kernel = weight.shape[-1]
    if weight.shape != (x.shape[3], 1, kernel, kernel):
        raise ValueError(
            f"depthwise_conv: weight of shape {tuple(weight.shape)} must be [{x.shape[3]}, 1, K, K], one kernel for "
            f"each channel of x, {tuple(x.shape)}."
        )
    rows = (x.shape[1] + top + bottom - kernel) // stride + 1
    columns = (x.shape[2] + left + right - kernel) // stride + 1
    if min(rows, columns) < 1:
        raise ValueError(f"depthwise_conv: a padded map of {tuple(x.shape[1:3])} is smaller than a kernel of {kernel}.")
    if residual and (rows, columns) != tuple(x.shape[1:3]):
        raise ValueError(
            f"depthwise_conv: residual=True needs a result of {tuple(x.shape[1:3])}, but it is {(rows, columns)}."
        )
    if maps.usable(x, weight, bias):
        from glocal.kernels.maps.depthwise import Depthwise, Shape

        return Depthwise.apply(x, weight, bias, Shape(stride, top, left, rows, columns, residual))  # type: ignore[no-any-return]
    image = x.permute(0, 3, 1, 2)
    pad = (0, 0)
    if top == bottom and left == right:
        pad = (top, left)
    else:
        image = F.pad(image, (left, right, top, bottom))
    found = F.conv2d(image, weight, bias, stride, pad, groups=x.shape[3]).permute(0, 2, 3, 1)
    return x + found if residual else found
