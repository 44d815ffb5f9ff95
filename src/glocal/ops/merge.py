"""Join branches of attention: exactly by log-sum-exp, by sum, by concatenation, by a gate.

`lse` is attention over the union of the keys the branches saw (merging of partial softmaxes; Generalized Neighborhood
Attention, arXiv 2504.16922, merges text keys this way). Gradients are plain autograd through out and LSE, exact as long
as the branches' LSE is differentiable, which that of `glocal.ops.attend` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glocal.ops.attention import Attended

Branch = tuple[Tensor, Tensor] | Attended


@dataclass(frozen=True, eq=False)
class Merged:
    """out: [..., N, Dv] in the type of the first branch. lse: [..., N] in the type of its LSE."""

    out: Tensor
    lse: Tensor


def lse(branches: Sequence[Branch]) -> Merged:
    """Attention over the union of the branches' keys; a key in two branches counts twice.

    branches: (out [..., N, Dv], lse [..., N]) pairs or `Attended` results, of one shape. The LSE is natural-log,
        float32 or float64; -inf marks a row that saw nothing, and its out is ignored whatever it holds.
    Rows that no branch saw give out 0, lse -inf and no gradient. Raises ValueError for no branches or other shapes.
    """
    pairs = [(b.out, b.lse) if isinstance(b, Attended) else b for b in branches]
    if not pairs:
        raise ValueError("merge.lse: needs at least one (out, lse) branch, got none.")
    shape = pairs[0][0].shape
    for number, (out, row) in enumerate(pairs):
        if out.shape != shape or row.shape != shape[:-1]:
            raise ValueError(
                f"merge.lse: branch {number} has out {tuple(out.shape)} and lse {tuple(row.shape)}; all need out "
                f"{tuple(shape)} and lse {tuple(shape[:-1])}."
            )
        if row.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"merge.lse: lse of branch {number} is {row.dtype}; legal: float32, float64.")
    rows = torch.stack([row for _, row in pairs])  # [branches, ..., N]
    top = rows.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp(rows - top)
    total = weights.sum(0)
    seen = total > 0
    total = torch.where(seen, total, 1)
    merged = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
    for (out, row), weight in zip(pairs, weights, strict=True):
        here = torch.where((row > -torch.inf)[..., None], out.to(rows.dtype), 0)
        merged = merged + (weight / total)[..., None] * here
    return Merged(merged.to(pairs[0][0].dtype), torch.where(seen, total.log() + top, -torch.inf))


def sum(branches: Sequence[Tensor]) -> Tensor:
    """Sum of outputs of one shape: parallel branches with a softmax each."""
    _same("merge.sum", branches, drop=None)
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch
    return total


def concat(branches: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Outputs side by side along `dim` (-1: channels, -3: heads)."""
    _same("merge.concat", branches, drop=dim)
    return torch.cat(list(branches), dim)


Axis = Literal["head", "position", "channel"]


def gate(alpha: Tensor | float, a: Tensor, b: Tensor, axis: Axis | None = None) -> Tensor:
    """alpha * a + (1 - alpha) * b for outputs [..., H, N, D].

    alpha: a number (say, by step); a tensor that broadcasts to a; or, with `axis`, [H], [N] or [D].
    """
    _same("merge.gate", (a, b), drop=None)
    if axis is None or not isinstance(alpha, Tensor):
        return alpha * a + (1 - alpha) * b
    places = {"head": -3, "position": -2, "channel": -1}
    if axis not in places:
        raise ValueError(f"merge.gate: axis={axis!r}; legal: 'head', 'position', 'channel', None.")
    place = places[axis]
    if alpha.shape != (a.shape[place],):
        raise ValueError(
            f"merge.gate: alpha of shape {tuple(alpha.shape)} with axis={axis!r} must be [{a.shape[place]}] for "
            f"outputs of shape {tuple(a.shape)}."
        )
    alpha = alpha.reshape(-1, *(1,) * (-1 - place))
    return alpha * a + (1 - alpha) * b


def _same(name: str, branches: Sequence[Tensor], drop: int | None) -> None:
    """ValueError unless all branches have one shape (apart from the axis `drop`)."""
    if not branches:
        raise ValueError(f"{name}: needs at least one output, got none.")
    shapes = [list(b.shape) for b in branches]
    for shape in shapes:
        if drop is not None:
            shape[drop] = -1
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{name}: outputs of shapes {[tuple(b.shape) for b in branches]} do not fit together.")
