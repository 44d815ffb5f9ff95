"""Linear attention: the sum over keys is taken before the query is looked at, so cost is linear in the tokens.

One core with three normalisers. Ratio divides by the row sum of the weights, with a floor (L2ViT, arXiv 2501.16182);
subtract takes the mean weight away and adds 1/N, so rows sum to one and different queries have different rows (InLine,
arXiv 2412.06590); none leaves the sums as they are. Feature maps of q and k are the caller's, or one of `FEATURES`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import maps

_MOST = 128  # size of a head that the kernels take


def _identity(x: Tensor) -> Tensor:
    return x


def _gentle_exp(x: Tensor) -> Tensor:
    return (0.2 * x).exp()


def _shifted_elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "exp": _gentle_exp,
    "elu": _shifted_elu,
}


def features(name: str, x: Tensor) -> Tensor:
    """An elementwise feature map: identity, relu, leakyrelu (slope 0.01), exp (of 0.2 x), elu (elu(x) + 1)."""
    if name not in FEATURES:
        raise ValueError(f"linear attention: feature={name!r}; legal: {', '.join(map(repr, FEATURES))}.")
    return FEATURES[name](x)


@dataclass(frozen=True, eq=False)
class Ratio:
    """out_i = numerator_scale * sum_j (q_i . k_j) v_j / max(sum_j q_i . k_j, floor).

    floor: lower limit of the row sum, before any scale. numerator_scale: a number or one for each head, [H].
    """

    floor: float = 1e-6
    numerator_scale: float | Tensor = 1.0


@dataclass(frozen=True)
class Subtract:
    """out_i = sum_j A_ij v_j, A_ij = (scale / N) q_i . (k_j - mean of k) + 1 / N: rows sum to 1, entries may be < 0.

    scale: None is head size ** -0.5. count: N, None is the number of keys.
    """

    scale: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Unnormalised:
    """out_i = scale * sum_j (q_i . k_j) v_j."""

    scale: float = 1.0


Normaliser = Ratio | Subtract | Unnormalised


def linear_attention(q: Tensor, k: Tensor, v: Tensor, normaliser: Normaliser, plus: Tensor | None = None) -> Tensor:
    """q: [..., H, Nq, D], k: [..., H, Nk, D] (after their feature maps), v: [..., H, Nk, Dv] -> [..., H, Nq, Dv].

    plus: what is added to the result, of its shape, such as the output of a local part. Sums over keys are taken in
    float32 (float64 for float64): they grow with the number of keys. The result has the type of v. Raises ValueError
    for shapes that do not fit.
    """
    _check(q, k, v)
    whole = (*q.shape[:-1], v.shape[-1])
    if plus is not None and plus.shape != whole:
        raise ValueError(f"linear_attention: plus of shape {tuple(plus.shape)} must be {whole}, as the result.")
    narrow = q.dim() == 4 and q.shape == k.shape and k.shape[0] == v.shape[0] and max(q.shape[3], v.shape[3]) <= _MOST
    if narrow and maps.usable(q, k, v, plus):
        return _fused(q, k, v, normaliser, plus)
    high = torch.float64 if v.dtype == torch.float64 else torch.float32
    meta = q.device.type == "meta"  # shapes alone: nothing is rounded there, and autocast does not know it
    with nullcontext() if meta else torch.autocast(q.device.type, enabled=False):
        out = _run(q.to(high), k.to(high), v.to(high), normaliser).to(v.dtype)
    return out if plus is None else out + plus


def _fused(q: Tensor, k: Tensor, v: Tensor, normaliser: Normaliser, plus: Tensor | None) -> Tensor:
    """The same by kernels that read tokens where they lie and sum in float32."""
    from glocal.kernels.maps.products import Apply, Totals

    heads = q.shape[1]
    a, b, c = (_side_by_side(t) for t in (q, k, v))
    beside = None if plus is None else _side_by_side(plus)
    summed, sum_k, sum_v = Totals.apply(b, c, heads)  # [B, H, D, Dv], [B, H, D], [B, H, Dv]
    if isinstance(normaliser, Ratio):
        scale = normaliser.numerator_scale
        factor = scale.to(summed.dtype)[:, None, None] if isinstance(scale, Tensor) else scale
        total = q @ sum_k.to(q.dtype)[..., None]  # [B, H, N, 1]
        out = _heads(Apply.apply(a, summed * factor, heads, None, None), heads) / total.clamp(min=normaliser.floor)
        return out if plus is None else out + plus
    if isinstance(normaliser, Subtract):
        scale = q.shape[-1] ** -0.5 if normaliser.scale is None else normaliser.scale
        share = scale / (k.shape[-2] if normaliser.count is None else normaliser.count)
        centred = (summed - sum_k[..., None] * (sum_v / k.shape[-2])[..., None, :]) * share
        return _heads(Apply.apply(a, centred, heads, sum_v / v.shape[-2], beside), heads)
    return _heads(Apply.apply(a, summed * normaliser.scale, heads, None, beside), heads)


def _heads(t: Tensor, heads: int) -> Tensor:
    """The inverse of `_side_by_side`."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def _side_by_side(t: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D], a view where the heads of a token lie side by side."""
    flat = t.transpose(1, 2).flatten(2)
    return flat if flat.stride(2) == 1 else flat.contiguous()


def _run(q: Tensor, k: Tensor, v: Tensor, normaliser: Normaliser) -> Tensor:
    if isinstance(normaliser, Ratio):
        scale = normaliser.numerator_scale
        factor = scale.to(q.dtype)[:, None, None] if isinstance(scale, Tensor) else scale
        total = q @ k.sum(-2)[..., None]  # [..., H, Nq, 1]
        return q @ (k.transpose(-1, -2) @ v * factor) / total.clamp(min=normaliser.floor)
    if isinstance(normaliser, Subtract):
        scale = q.shape[-1] ** -0.5 if normaliser.scale is None else normaliser.scale
        share = scale / (k.shape[-2] if normaliser.count is None else normaliser.count)
        centred = (k - k.mean(-2, keepdim=True)).transpose(-1, -2) @ v  # [..., H, D, Dv]
        return q @ (centred * share) + v.mean(-2, keepdim=True)
    return q @ (k.transpose(-1, -2) @ v * normaliser.scale)


def linear_weights(q: Tensor, k: Tensor, normaliser: Normaliser) -> Tensor:
    """The matrix that `linear_attention` multiplies v by, [..., H, Nq, Nk]: for looking and testing, quadratic."""
    logits = q @ k.transpose(-1, -2)
    if isinstance(normaliser, Ratio):
        scale = normaliser.numerator_scale
        factor = scale.to(q.dtype)[:, None, None] if isinstance(scale, Tensor) else scale
        return factor * logits / logits.sum(-1, keepdim=True).clamp(min=normaliser.floor)
    if isinstance(normaliser, Subtract):
        scale = q.shape[-1] ** -0.5 if normaliser.scale is None else normaliser.scale
        share = scale / (k.shape[-2] if normaliser.count is None else normaliser.count)
        return share * (logits - logits.mean(-1, keepdim=True)) + 1 / k.shape[-2]
    return normaliser.scale * logits


def told_apart(q: Tensor, k: Tensor, normaliser: Normaliser, factor: float = 2.0) -> Tensor:
    """How far the weights of each query move when it grows by `factor`, over their length: 0 where the two queries
    cannot be told apart (arXiv 2412.06590, section 3.2). q, k: as of `linear_weights`. Returns [..., H, Nq].

    A ratio gives 0 for every feature map that grows along, such as the identity and ReLU; subtraction does not.
    """
    rows = linear_weights(q, k, normaliser)
    return (linear_weights(factor * q, k, normaliser) - rows).norm(dim=-1) / rows.norm(dim=-1)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() < 3 or t.shape[-3] != q.shape[-3]:
            raise ValueError(
                f"linear_attention: {name} of shape {tuple(t.shape)} must be [..., {q.shape[-3]} heads, tokens, size]."
            )
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"linear_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; q and k need one head "
            f"size, k and v one number of tokens."
        )
