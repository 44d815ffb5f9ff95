"""Token reordering as a definition: rows of several tensors by an order, with RMS-norm and rotary embedding on the way.

What tiled attention needs around its kernels (the token permutation of arXiv 2504.16922), and what the hosts do to
queries and keys just before it: RMS-norm over a head (HunyuanVideo, FLUX) or over all heads (Wan), then rotation of
pairs of channels. `glocal.kernels.triton.permute` does all of it in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Finish:
    """What happens to the rows of one tensor [B, H, N, D]: RMS-norm, then rotation; both in float32, rounded once.

    weight: [D], norm over each head, or [H * D], norm over all heads of a token; None for no norm. eps: added to the
        mean square.
    cos, sin: of the rotation angles, broadcast to [B, H, N, D / 2], by token, so before the reordering; None for no
        rotation. Tokens that are not rotated have cos 1 and sin 0.
    interleaved: channels 2 j and 2 j + 1 are a pair (FLUX, Wan, HunyuanVideo); otherwise j and j + D / 2.
    """

    weight: Tensor | None = None
    eps: float = 1e-6
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = True

    def across(self, heads: int, size: int) -> bool:
        """Whether the norm of a tensor of `heads` x `size` runs over all heads."""
        return self.weight is not None and heads > 1 and self.weight.numel() == heads * size

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [t for t in (self.weight, self.cos, self.sin) if t is not None]


def check(tensors: Sequence[Tensor], order: Tensor, finish: Sequence[Finish | None]) -> None:
    """Raise ValueError for shapes that do not fit: tensors [B, H, N, D], order [B|1, H|1, M]."""
    if order.dim() != 3 or order.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"reorder: order of shape {tuple(order.shape)}, {order.dtype}; legal: [batch|1, heads|1, slots], int32."
        )
    if len(finish) not in (0, len(tensors)):
        raise ValueError(
            f"reorder: {len(finish)} entries in finish for {len(tensors)} tensors; legal: none, or one each."
        )
    for i, t in enumerate(tensors):
        if t.dim() != 4:
            raise ValueError(
                f"reorder: tensor {i} of shape {tuple(t.shape)}; legal: [batch, heads, tokens, head size]."
            )
        if t.device != order.device:
            raise ValueError(f"reorder: tensor {i} lies on {t.device}, order on {order.device}; they must agree.")
        if order.shape[0] not in (1, t.shape[0]) or order.shape[1] == 0 or t.shape[1] % order.shape[1]:
            raise ValueError(
                f"reorder: order {tuple(order.shape)} for tensor {i} of shape {tuple(t.shape)}; legal: batch 1 or "
                f"{t.shape[0]}, heads a divisor of {t.shape[1]}."
            )
    for i, (t, step) in enumerate(zip(tensors, finish, strict=False)):
        if step is not None:
            _check_finish(i, t, order.shape[1], step)


def gather_rows(tensors: Sequence[Tensor], order: Tensor, finish: Sequence[Finish | None] = ()) -> list[Tensor]:
    """tensors: [B, H, N, D] each, heads may differ; order: [B|1, H|1, M], -1 gives rows of 0 -> [B, H, M, D] each."""
    check(tensors, order, finish)
    out = []
    for i, t in enumerate(tensors):
        step = finish[i] if finish else None
        t = t if step is None else finished(t, step)
        token = _expanded(order, t)  # [B, H, M]
        rows = t.gather(2, token.clamp(min=0)[..., None].expand(*token.shape, t.shape[3])) if t.shape[2] else None
        empty = t.new_zeros(())
        out.append(
            t.new_zeros(*token.shape, t.shape[3]) if rows is None else torch.where(token[..., None] < 0, empty, rows)
        )
    return out


def finish_rows(tensors: Sequence[Tensor], finish: Sequence[Finish]) -> list[Tensor]:
    """Norm and rotation where rows lie: tensors [B, H, N, D] each -> the same shapes, in memory as they were."""
    check_rows(tensors, finish)
    return [torch.empty_like(t).copy_(finished(t, step)) for t, step in zip(tensors, finish, strict=True)]


def check_rows(tensors: Sequence[Tensor], finish: Sequence[Finish]) -> None:
    """Raise ValueError for shapes that do not fit: tensors [B, H, N, D], a step each."""
    for t in tensors:
        check([t], torch.zeros(1, 1, 0, dtype=torch.int32, device=t.device), ())
    if len(finish) != len(tensors):
        raise ValueError(f"finish_rows: {len(finish)} steps for {len(tensors)} tensors; legal: one each.")
    for i, (t, step) in enumerate(zip(tensors, finish, strict=True)):
        _check_finish(i, t, 1, step)


def scatter_rows(t: Tensor, order: Tensor, n: int, out: Tensor | None = None, finish: Finish | None = None) -> Tensor:
    """The inverse: t [B, H, M, D] -> [B, H, n, D]; a token outside the order is 0, or stays as it is in `out`.

    Each token stands at most once in the order. finish: as in `gather_rows`, by token.
    """
    check([t], order, [])
    token = _expanded(order, t)
    if out is None:
        out = t.new_zeros(t.shape[0], t.shape[1], n, t.shape[3])
    place = torch.where(token < 0, n, token)[..., None].expand(t.shape)
    padded = torch.cat([out, out.new_zeros(*out.shape[:2], 1, out.shape[3])], 2)
    found = padded.scatter(2, place, t.to(out.dtype))[:, :, :n]
    if finish is not None:
        _check_finish(0, found, order.shape[1], finish)
        hit = torch.zeros(padded.shape[:3], dtype=torch.bool, device=t.device).scatter(2, place[..., 0], True)[:, :, :n]
        found = torch.where(hit[..., None], finished(found, finish), found)
    return out.copy_(found)


def sum_rows(t: Tensor, order: Tensor, n: int) -> Tensor:
    """Each token's rows added up, the gradient of `gather_rows`: t [B, H, M, D] -> [B, H, n, D]."""
    token = _expanded(order, t)
    place = torch.where(token < 0, n, token)[..., None].expand(t.shape)
    return t.new_zeros(*t.shape[:2], n + 1, t.shape[3]).scatter_add(2, place, t)[:, :, :n].contiguous()


def finished(t: Tensor, step: Finish) -> Tensor:
    """RMS-norm and rotation of t: [B, H, N, D]."""
    x = t.float() if t.dtype != torch.float64 else t
    if step.weight is not None:
        x = _normed(x, step)[0] * _weight(x, step)
    if step.cos is not None and step.sin is not None:
        a, b = _pairs(x, step)
        x = _joined(a * step.cos - b * step.sin, a * step.sin + b * step.cos, step)
    return x.to(t.dtype)


def finished_backward(grad: Tensor, t: Tensor, step: Finish) -> list[Tensor]:
    """grad [B, H, N, D] of `finished` -> gradients of t and of the tensors of the step, in their order."""
    x, g = (u.float() if u.dtype != torch.float64 else u for u in (t, grad))
    size, (normed, rate) = x, (x, None)
    if step.weight is not None:
        normed, rate = _normed(x, step)
        size = normed * _weight(x, step)
    found: list[Tensor] = []
    if step.cos is not None and step.sin is not None:
        (a, b), (to_a, to_b) = _pairs(size, step), _pairs(g, step)
        found = [
            (to_a * a + to_b * b).sum_to_size(_whole(step.cos)),
            (to_b * a - to_a * b).sum_to_size(_whole(step.sin)),
        ]
        g = _joined(to_a * step.cos + to_b * step.sin, to_b * step.cos - to_a * step.sin, step)
    if step.weight is not None and rate is not None:
        by_weight = (g * normed).sum((0, 2) if step.across(*x.shape[1::2]) else (0, 1, 2))
        g = g * _weight(x, step)
        g = rate * (g - normed * (g * normed).mean(_dims(x, step), keepdim=True))
        found = [by_weight, *found]
    shaped = [f.reshape(u.shape).to(u.dtype) for f, u in zip(found, step.tensors(), strict=True)]
    return [g.to(t.dtype), *shaped]


def _normed(x: Tensor, step: Finish) -> tuple[Tensor, Tensor]:
    """x [B, H, N, D] over its root mean square, and one over that."""
    rate = (x.square().mean(_dims(x, step), keepdim=True) + step.eps).rsqrt()
    return x * rate, rate


def _dims(x: Tensor, step: Finish) -> tuple[int, ...]:
    return (1, 3) if step.across(x.shape[1], x.shape[3]) else (3,)


def _weight(x: Tensor, step: Finish) -> Tensor:
    """[D], or [1, H, 1, D] for a norm over all heads."""
    assert step.weight is not None
    h, d = x.shape[1], x.shape[3]
    weight = step.weight.to(x.dtype)
    return weight.reshape(1, h, 1, d) if step.across(h, d) else weight


def _pairs(x: Tensor, step: Finish) -> tuple[Tensor, Tensor]:
    """Both channels of each pair, [B, H, N, D / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if step.interleaved else x.chunk(2, -1)
    return a, b


def _joined(a: Tensor, b: Tensor, step: Finish) -> Tensor:
    """The inverse of `_pairs`."""
    return torch.stack((a, b), -1).flatten(-2) if step.interleaved else torch.cat((a, b), -1)


def _whole(table: Tensor) -> tuple[int, ...]:
    """The shape of cos or sin with all four axes."""
    return (1,) * (4 - table.dim()) + tuple(table.shape)


def _check_finish(i: int, t: Tensor, orders: int, step: Finish) -> None:
    h, n, d = t.shape[1:]
    if step.weight is not None and tuple(step.weight.shape) not in ((d,), (h * d,)):
        raise ValueError(
            f"reorder: norm weight of shape {tuple(step.weight.shape)} for tensor {i} of {h} heads of size {d}; "
            f"legal: [{d}] (a head) or [{h * d}] (all heads)."
        )
    if step.across(h, d) and orders > 1:
        raise ValueError(
            f"reorder: a norm over all {h} heads with an order for each of {orders} heads; legal: one order "
            "for all heads, or a norm of each head."
        )
    if (step.cos is None) != (step.sin is None):
        raise ValueError("reorder: cos and sin go together; one of them is None.")
    for name, table in (("cos", step.cos), ("sin", step.sin)):
        if table is None:
            continue
        shape = _whole(table)
        wanted = (t.shape[0], h, n, d // 2)
        if d % 2 or len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, wanted, strict=True)):
            raise ValueError(
                f"reorder: {name} of shape {tuple(table.shape)} does not broadcast to {wanted} (half of an even head "
                "size on the last axis; take every second entry of a table that repeats itself)."
            )


def _expanded(order: Tensor, t: Tensor) -> Tensor:
    """int64 [B, H, M]."""
    return order.long().repeat_interleave(t.shape[1] // order.shape[1], 1).expand(t.shape[0], -1, -1)
