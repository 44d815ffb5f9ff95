"""Quantised attention in plain torch: the definition, which rounds as the kernel does, block by block.

    q8 = round(q / sq), k8 = round((k - mean k) / sk);  s = scale sq sk (q8 k8);  m = running maximum of s
    P = round(w exp(s - m)), w = 127 or 256;  out = sv (sum P v8) / (w sum exp(s - m));  lse = m + log sum exp(s - m)

Rounding is to nearest, of halves to even. A row that sees nothing gives out 0 and lse -inf.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from glocal.kernels.call import Call
from glocal.kernels.quant import LARGEST, WEIGHT
from glocal.kernels.quantised.work import Work
from glocal.plan.blockplan import unpack

_LEAST = 1e-7  # largest magnitude of a group of zeros


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, work: Work) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    quant, group = work.quant, q.shape[1] // k.shape[1]
    k, mean = smoothed(k, work)
    q8, sq = rounded(work.ordered_q(q), quant.group[0], quant.qk)
    k8, sk = (t.repeat_interleave(group, 1) for t in rounded(work.ordered_k(k), quant.group[1], quant.qk))
    v8, sv = (t.repeat_interleave(group, 1) for t in rounded_values(work.ordered_k(v), quant.pv))
    sq, sk = sq.repeat_interleave(quant.group[0], 2), sk.repeat_interleave(quant.group[1], 2)
    qb, kb = call.q_block, call.kv_block
    rows = q8.unflatten(2, (-1, qb)) * (sq.unflatten(2, (-1, qb)) * call.scale)[..., None]  # [B, H, blocks, qb, D]
    keys, values = k8.unflatten(2, (-1, kb)) * sk.unflatten(2, (-1, kb))[..., None], v8.unflatten(2, (-1, kb))
    live_keys = work.key_live(q.shape[1]).unflatten(2, (-1, kb))
    acc = rows.new_zeros(*rows.shape[:4], v8.shape[3])
    top, total = rows.new_full(rows.shape[:4], -torch.inf), rows.new_zeros(rows.shape[:4])
    weight = WEIGHT[quant.pv]
    for index, count, mask in work.lists(q.shape[1]):
        for i in range(index.shape[-1]):
            at = index[..., i].long().expand(*rows.shape[:3])  # [B, H, blocks]
            here = live_keys.expand(*rows.shape[:2], -1, -1).gather(2, at[..., None].expand(-1, -1, -1, kb))
            seen = here[:, :, :, None] & (i < count)[..., None, None]  # [B, H, blocks, 1, kb]
            if mask is not None:
                seen = seen & unpack(call.plan.masks, kb)[mask[..., i].long()]  # type: ignore[union-attr]
            s = rows @ _picked(keys, at).mT
            s = s.masked_fill(~seen, -torch.inf)
            new = torch.maximum(top, s.amax(-1))
            shift = new.masked_fill(new == -torch.inf, 0)
            p = (s - shift[..., None]).exp() * weight
            old = (top - shift).exp()
            total = total * old + p.sum(-1)
            acc = acc * old[..., None] + _weights(p, quant.pv, q.dtype) @ _picked(values, at)
            top = new
    none = total == 0
    out = (acc / total.masked_fill(none, 1)[..., None]).flatten(2, 3) * sv
    lse = (top + total.log() - log(weight)).flatten(2, 3)
    out, lse = work.returned(out.to(q.dtype), lse)
    return out, unsmoothed(lse, q, mean, call.scale)


def rounded(x: Tensor, group: int, kind: str) -> tuple[Tensor, Tensor]:
    """x [B, H, n, D] -> rounded values as float32 and scales [B, H, n / group]."""
    parts = x.float().unflatten(2, (-1, group))
    scale = parts.abs().amax((-1, -2)).clamp(min=_LEAST) / LARGEST[kind]
    return _to(parts / scale[..., None, None], kind).flatten(2, 3), scale


def rounded_values(v: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """v [B, H, n, Dv] -> rounded values as float32 and scales [B, H, 1, Dv]."""
    v = v.float()
    if kind == "none":
        return v, v.new_ones(*v.shape[:2], 1, v.shape[3])
    scale = v.abs().amax(2, keepdim=True).clamp(min=_LEAST) / LARGEST[kind]
    return _to(v / scale, kind), scale


def smoothed(k: Tensor, work: Work) -> tuple[Tensor, Tensor | None]:
    """k less its mean over all tokens in float32, and the mean [B, Hkv, 1, D]."""
    if not work.quant.smooth_k:
        return k, None
    mean = k.float().mean(2, keepdim=True)
    return k.float() - mean, mean


def unsmoothed(lse: Tensor, q: Tensor, mean: Tensor | None, scale: float) -> Tensor:
    """The LSE of the keys as they were: every logit of a row lost scale q mean(k)."""
    if mean is None:
        return lse
    wide = mean.repeat_interleave(q.shape[1] // mean.shape[1], 1)
    return lse + scale * (q.float() @ wide.mT)[..., 0]


def _weights(p: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    return _to(p, kind) if kind != "none" else p.to(dtype).float()


def _to(x: Tensor, kind: str) -> Tensor:
    if kind == "fp8":
        return x.clamp(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn).float()
    return x.round().clamp(-LARGEST[kind], LARGEST[kind])


def _picked(blocks: Tensor, at: Tensor) -> Tensor:
    """[B, H, key blocks, kb, D] at [B, H, query blocks] -> [B, H, query blocks, kb, D]."""
    return blocks.gather(2, at[..., None, None].expand(-1, -1, -1, *blocks.shape[3:]))
