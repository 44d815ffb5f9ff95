"""The steps between the branches of a transformer block: a gated branch joins the stream, and the next one gets the
layer norm of the sum, scaled and shifted (adaptive layer norm, arXiv 2212.09748).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import maps

_MOST = 16384  # channels of a row that the kernel takes


def joined(
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    change: tuple[Tensor, Tensor] | None = None,
    eps: float | None = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """total = x + branch * gate, and layer_norm(total) * weight + bias, times 1 + scale, plus shift.

    x, branch: [B, N, C]. gate: broadcasts to them, None: 1. norm: weight and bias [C]. change: scale and shift, which
    broadcast to x. eps: of the norm, None for no norm.

    All in float32; total is rounded to the dtype of x before it is normed. On a GPU, in eager calls without gradients,
    one kernel. Returns total (x itself without a branch) and the normed rows (None without a norm), of x's dtype.
    """
    right = x.dim() == 3 and x.shape[-1] <= _MOST and (branch is None or branch.shape == x.shape)
    if right and not torch.is_grad_enabled() and maps.usable(x, branch):
        from glocal.kernels.maps.stream import stream

        return stream(x, branch, gate, norm, change, eps)
    total = x
    if branch is not None:
        more = branch.float() if gate is None else branch.float() * gate
        total = (x.float() + more).to(x.dtype)
    if eps is None:
        return total, None
    found = F.layer_norm(total.float(), x.shape[-1:], *((t.float() for t in norm) if norm is not None else ()), eps=eps)
    if change is not None:
        found = found * (1 + change[0]) + change[1]
    return total, found.to(x.dtype)
