"""Depthwise convolution of channels-last maps; on a GPU, in eager calls, with bias and residual in one kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import maps
from glocal.ops.norm import Activation, activate, check_activation, stored_norm

Norm = tuple[tuple[Tensor, Tensor, Tensor, Tensor], float]


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    residual: bool = False,
    norm: Norm | None = None,
    act: Activation = "none",
) -> Tensor:
    """Each channel with a square kernel of its own.

    x: [B, H, W, C]; weight: [C, 1, K, K]; bias: [C] or None; padding: zeros at the top, bottom, left and right.
    residual: x is added, which needs a result of its size. norm: ((mean, variance, weight, bias), eps) of a batch norm
    by stored statistics behind it; act: an activation at the end, as in `stored_norm`. Returns [B, h, w, C] with
    h = (H + top + bottom - K) // stride + 1. Raises ValueError for other weights, a map below the kernel, a residual
    that does not fit, or an unknown activation.
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
    check_activation("depthwise_conv", act)
    if norm is None and act == "none" and maps.autocasts(x):  # to half precision; what is added to stays as it is
        low = torch.get_autocast_dtype("cuda")
        given = x.to(low), weight.to(low), None if bias is None else bias.to(low)
        with torch.autocast("cuda", enabled=False):
            found = depthwise_conv(*given, stride=stride, padding=padding)
        return x + found if residual else found
    few = x.shape[0] * max(x.shape[1] * x.shape[2], rows * columns) < 2**31
    if few and maps.usable(x, weight, bias, *(() if norm is None else norm[0])):
        from glocal.kernels.maps import depthwise

        shape = depthwise.Shape(stride, top, left, rows, columns, residual)
        if not torch.is_grad_enabled():
            return depthwise.forward(x.contiguous(), weight.contiguous(), bias, shape, norm, act)
        if norm is None and act == "none":
            return depthwise.Depthwise.apply(x, weight, bias, shape)  # type: ignore[no-any-return]
    image = x.permute(0, 3, 1, 2)
    pad = (0, 0)
    if top == bottom and left == right:
        pad = (top, left)
    else:
        image = F.pad(image, (left, right, top, bottom))
    found = F.conv2d(image, weight, bias, stride, pad, groups=x.shape[3]).permute(0, 2, 3, 1)
    found = x + found if residual else found
    return activate(found, act) if norm is None else stored_norm(found, *norm, act)
