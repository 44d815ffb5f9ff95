"""Attention between channels: each channel is a token whose feature is the whole image, linear in the tokens.

The forms of DaViT (arXiv 2204.03645) and of the systems that normalise, sharpen or flip it differ in the roles of
q, k, v, in the scale and in the activation; all are arguments here.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal._exact import exact
from glocal.kernels import maps

_MOST = 128  # channels of a group that the kernels take

Normalise = Literal["none", "l2"]
Activation = Literal["softmax", "softmin", "relu", "signed_root"]


def gram(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: int = 1,
    *,
    scale: float | Tensor = 1.0,
    normalise: Normalise = "none",
    activation: Activation = "softmax",
) -> Tensor:
    """out[n, i] = sum_j A[i, j] v[n, j] with A = activation(scale * q^T k), inside groups of channels.

    q, k, v: [B, N, C], N tokens; k and v have equal channels, those of out follow q. groups: divides the channels.
    scale: a number or one for each group, [groups]. normalise: "l2" divides every channel of q and k by its length
    over the tokens. activation: softmax over j; softmin is softmax of the negative; relu; signed_root is
    sign(x) sqrt(|x|).

    q^T k and its activation are computed in float32 (float64 for float64): the sums run over all tokens.
    Returns [B, N, C]. Raises ValueError for shapes, groups or words that do not fit.
    """
    _check(q, k, v, groups, normalise, activation)
    if normalise == "none" and maps.usable(q, k, v) and max(q.shape[2], k.shape[2]) <= _MOST * groups:
        return _fused((q, k, v), groups, scale, activation)
    q, k = (t.transpose(1, 2).unflatten(1, (groups, -1)) for t in (q, k))  # [B, groups, d, N]
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(high), k.to(high)
    if normalise == "l2":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    factor = scale.to(high)[:, None, None] if isinstance(scale, Tensor) else scale
    with exact(q):
        weights = _activate((q * factor) @ k.transpose(-1, -2), activation).to(v.dtype)  # [B, groups, d, d]
        values = v.unflatten(2, (groups, -1)).permute(0, 2, 3, 1)  # [B, groups, d, N]
        return (weights @ values).flatten(1, 2).transpose(1, 2)


def _fused(qkv: tuple[Tensor, Tensor, Tensor], groups: int, scale: float | Tensor, activation: Activation) -> Tensor:
    """The same by kernels that read tokens where they lie."""
    from glocal.kernels.maps.products import Apply, Products

    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in qkv)
    logits: Tensor = Products.apply(q, k, groups)  # [B, groups, d, e]
    factor = scale.to(logits.dtype)[:, None, None] if isinstance(scale, Tensor) else scale
    return Apply.apply(v, _activate(logits * factor, activation).mT, groups, None, None)  # type: ignore[no-any-return]


def _activate(logits: Tensor, activation: Activation) -> Tensor:
    if activation == "softmax":
        return logits.softmax(-1)
    if activation == "softmin":
        return (-logits).softmax(-1)
    if activation == "relu":
        return logits.relu()
    return logits.sign() * logits.abs().sqrt()


def _check(q: Tensor, k: Tensor, v: Tensor, groups: int, normalise: str, activation: str) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3 or t.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"gram: {name} of shape {tuple(t.shape)} must be [batch, tokens, channels], the first two as in q, "
                f"{tuple(q.shape)}."
            )
        if groups < 1 or t.shape[2] % groups:
            raise ValueError(f"gram: groups={groups} must divide the {t.shape[2]} channels of {name}.")
    if k.shape != v.shape:
        raise ValueError(f"gram: k has {k.shape[2]} channels, v has {v.shape[2]}; they must agree.")
    for name, value, kind in (("normalise", normalise, Normalise), ("activation", activation, Activation)):
        if value not in get_args(kind):
            raise ValueError(f"gram: {name}={value!r}; legal: {', '.join(map(repr, get_args(kind)))}.")
