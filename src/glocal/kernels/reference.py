"""The definition of attention over a relation: dense, exact, any dtype, shares nothing with the fast kernels.

    s = softcap(scale * q k^T) + bias;  p = m exp(s) / sum(m exp(s));  out = p v;  lse = log sum(m exp(s))

where m says how often a query sees a key. A row that sees nothing gives out 0 and lse -inf. Keys that nobody sees do
not leak, whatever they hold. Backward is the derivative of the same lines, through out and lse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.kernels.call import Bias, Call, DenseBias, Grads, TableBias
from glocal.kernels.capability import ALL_DTYPES, Capability

CAPABILITY = Capability(
    name="reference",
    needs="counts",
    devices=("cpu", "cuda", "mps", "xpu"),
    dtypes=ALL_DTYPES,
    note="the definition, dense and exact; holds every query-key pair",
    dropout=True,
    most_pairs=1 << 30,
)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    w = _weights(q, k, v, call)
    return (w.kept @ w.v).to(q.dtype), w.lse


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """dS = P (dP - delta + dLSE), then the chain rule through bias, soft-cap and the two products."""
    w = _weights(q, k, v, call)
    grad = grad_out.to(w.p.dtype)
    groups = q.shape[1] // k.shape[1]
    grad_v = _sum_groups(w.kept.transpose(-1, -2) @ grad, groups)
    grad_p = grad @ w.v.transpose(-1, -2) * w.drop
    delta = (grad_p * w.p).sum(-1, keepdim=True)
    through_lse = torch.where(w.lse.isinf(), 0, grad_lse.to(w.p.dtype))[..., None]
    grad_s = w.p * (grad_p - delta + through_lse)  # [B, Hq, Nq, Nk]
    grad_bias = tuple(_bias_grad(bias, grad_s) for bias in call.bias)
    if call.softcap is not None:
        grad_s = grad_s * (1 - w.tanh.square())
    grad_s = grad_s * call.scale
    grad_k = _sum_groups(grad_s.transpose(-1, -2) @ q.to(w.p.dtype), groups)
    return Grads((grad_s @ w.k).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias)


@dataclass(frozen=True, eq=False)
class _Weights:
    """p: probabilities; kept: p after dropout; drop: its factor; tanh: of the capped logits; k, v: by query head."""

    p: Tensor
    kept: Tensor
    drop: Tensor
    lse: Tensor
    tanh: Tensor
    k: Tensor
    v: Tensor


def _weights(q: Tensor, k: Tensor, v: Tensor, call: Call) -> _Weights:
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    counts = _counts(q, k, call)  # [B, Hq, Nq, Nk]
    visible = (counts > 0).any(2)[..., None]  # a key that nobody sees is cleared: 0 * NaN would leak
    k = torch.where(visible, k.repeat_interleave(groups, 1).to(high), 0)
    v = torch.where(visible, v.repeat_interleave(groups, 1).to(high), 0)
    s = q.to(high) @ k.transpose(-1, -2) * call.scale
    tanh = s
    if call.softcap is not None:
        tanh = torch.tanh(s / call.softcap)
        s = call.softcap * tanh
    for bias in call.bias:
        s = s + (bias.values if isinstance(bias, DenseBias) else _looked_up(bias)).to(high)
    seen = counts > 0
    s = torch.where(seen, s + counts.clamp(min=1).to(high).log(), -torch.inf)
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    top = torch.where(top == -torch.inf, 0, top)
    e = torch.where(seen, torch.exp(s - top), 0)
    total = e.sum(-1, keepdim=True)
    p = e / torch.where(total == 0, 1, total)
    drop = torch.ones((), dtype=high, device=q.device)
    if call.dropout > 0:
        drop = keep_mask(call, p.shape, p.device).to(high) / (1 - call.dropout)
    return _Weights(p, p * drop, drop, (top + total.log()).squeeze(-1), tanh, k, v)


def _counts(q: Tensor, k: Tensor, call: Call) -> Tensor:
    assert call.counts is not None
    counts = call.counts
    if counts.shape[1] not in (1, q.shape[1]):
        counts = counts.repeat_interleave(q.shape[1] // counts.shape[1], 1)
    counts = counts.expand(q.shape[0], q.shape[1], -1, -1)
    if call.segments is not None:
        mine, theirs = call.segments
        same = (mine[:, :, None] == theirs[:, None, :]) & (mine >= 0)[:, :, None]  # [B, Nq, Nk]
        counts = counts * same[:, None]
    return counts


def _looked_up(bias: TableBias) -> Tensor:
    index = bias.k_code[None, :] - bias.q_code[:, None]  # [Nq, Nk]
    inside = (index >= 0) & (index < bias.table.shape[1])
    return torch.where(inside, bias.table[:, torch.where(inside, index, 0)], 0)  # [H|1, Nq, Nk]


def _bias_grad(bias: Bias, grad_s: Tensor) -> Tensor:
    if isinstance(bias, DenseBias):
        return grad_s.sum_to_size(bias.values.shape).to(bias.values.dtype)
    index = bias.k_code[None, :] - bias.q_code[:, None]
    inside = (index >= 0) & (index < bias.table.shape[1])
    flat = grad_s.sum(0)[:, inside]  # [Hq, pairs]
    if bias.table.shape[0] == 1:
        flat = flat.sum(0, keepdim=True)
    out = torch.zeros(bias.table.shape, dtype=grad_s.dtype, device=grad_s.device)
    return out.index_add_(1, index[inside], flat).to(bias.table.dtype)


def _sum_groups(grad: Tensor, groups: int) -> Tensor:
    return grad.unflatten(1, (-1, groups)).sum(2)


def keep_mask(call: Call, shape: torch.Size, device: torch.device) -> Tensor:
    """Which weights survive dropout, bool, the same for forward and backward."""
    assert call.seed is not None
    generator = torch.Generator(device=device).manual_seed(int(call.seed))
    return torch.rand(shape, generator=generator, device=device) >= call.dropout
