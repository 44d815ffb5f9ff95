"""What a call approximated, and how far it is from exact attention on a sample of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glocal.kernels import _blockwise
from glocal.kernels._jobs import Limits
from glocal.kernels.call import Call

_LIMITS = Limits(keys=1 << 18, scores=1 << 24)
_BLOCKS = 4  # query blocks that are computed again


@dataclass(frozen=True)
class Approximation:
    """what: in words. error: RMS of the difference over RMS of exact attention, of `rows` rows a head; worst: largest
    difference over the largest exact value.
    """

    what: str
    error: float
    worst: float
    rows: int


def measured(qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, call: Call) -> Approximation:
    """Compare out [B, Hq, Nq, Dv] with exact attention in float32 over query blocks spread over the plan."""
    assert call.plan is not None and call.quant is not None
    q, k, v = qkv
    plan = call.plan
    blocks = plan.full_count.shape[1]
    picked = torch.linspace(0, max(0, blocks - 1), min(_BLOCKS, blocks)).round().long().unique().to(q.device)
    keep = torch.zeros(blocks, dtype=plan.full_count.dtype, device=q.device)
    keep[picked] = 1
    some = replace(plan, full_count=plan.full_count * keep, part_count=plan.part_count * keep)
    exact, _ = _blockwise.forward(q, k, v, replace(call, plan=some, quant=None), _LIMITS)
    rows = plan.q_order.unflatten(-1, (blocks, -1))[:, :, picked].flatten(2)  # [b, h, rows]
    heads = q.shape[1]
    if rows.shape[1] not in (1, heads):
        rows = rows.repeat_interleave(heads // rows.shape[1], 1)
    place = rows.clamp(min=0).long().expand(q.shape[0], heads, -1)
    live = (rows >= 0)[..., None]
    want, have = (
        torch.where(live, t.gather(2, place[..., None].expand(*place.shape, t.shape[3])), 0).float()
        for t in (exact, out)
    )
    gap, size = (have - want).square().mean().sqrt(), want.square().mean().sqrt()
    worst, most = (have - want).abs().amax(), want.abs().amax()
    tiny = torch.finfo(torch.float32).tiny
    return Approximation(
        what=str(call.quant),
        error=float(gap / size.clamp(min=tiny)),
        worst=float(worst / most.clamp(min=tiny)),
        rows=int((rows >= 0).sum(-1).max()) if rows.numel() else 0,
    )
