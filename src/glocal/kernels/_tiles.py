"""One batch of query rows against its gathered keys: additive masks, biases, and the attention of a tile.

    s = softcap(scale * q k^T) + add;  out = softmax(s) v;  lse = log sum exp(s)

`add` holds -inf where a pair is hidden and the biases elsewhere. Shapes: q [n, g, R, D] against k [n, g, L, D] for n
members (samples and heads) and g lists; R runs over query heads of the key head, then over query tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.kernels.call import Bias, Call, DenseBias

_TABLE = 1 << 24  # mask entries kept unpacked for a whole call
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which tokens and heads a tile holds. q: int64 [g, rows]; k: int64 [g, L]; -1 pads.

    sample: int64 [n]; heads: int64 [n, r] query heads of each member.
    """

    q: Tensor
    k: Tensor
    sample: Tensor
    heads: Tensor


class MaskRows:
    """The mask table as additive rows: packed bits become 0 and -inf, row M is all 0, row M + 1 all -inf."""

    def __init__(self, masks: Tensor, kv_block: int, dtype: torch.dtype) -> None:
        self.masks, self.kv_block, self.dtype = masks, kv_block, dtype
        self.small = (masks.shape[0] + 2) * masks.shape[1] * kv_block <= _TABLE
        self.table: Tensor | None = None  # made on first use

    def add(self, ids: Tensor, shared: int) -> Tensor:
        """ids: [lists * shared, m] -> [1, lists, shared * q_block, m * kv_block]."""
        if self.small and self.table is None:  # two threads may both make it: the same numbers
            self.table = self._unpacked(torch.arange(self.masks.shape[0] + 2, device=ids.device))
        table = self.table
        if table is None:
            used, ids = torch.unique(ids, return_inverse=True)
            table = self._unpacked(used)
        rows, m = ids.shape
        picked = table.index_select(1, ids.flatten())  # [q_block, rows * m, kv_block]
        picked = picked.view(-1, rows, m * self.kv_block).transpose(0, 1)  # [rows, q_block, L]
        return picked.reshape(1, rows // shared, -1, m * self.kv_block)

    def _unpacked(self, ids: Tensor) -> Tensor:
        """Mask rows as [q_block, rows, kv_block], each byte of bits looked up as eight numbers at once."""
        shape = (1, *self.masks.shape[1:])
        both = [self.masks.new_full(shape, -1), self.masks.new_zeros(shape)]  # all seen, nothing seen
        words = torch.cat([self.masks, *both]).index_select(0, ids).transpose(0, 1).contiguous()
        numbers = torch.arange(256, device=ids.device)[:, None] >> torch.arange(8, device=ids.device)
        eight = torch.zeros(256, 8, dtype=self.dtype, device=ids.device).masked_fill_(numbers & 1 == 0, -torch.inf)
        rows = eight.index_select(0, words.view(torch.uint8).flatten().int())  # bytes lie from low to high
        return rows.view(*words.shape[:2], -1)[..., : self.kv_block].contiguous()


@dataclass(frozen=True, eq=False)
class Lookup:
    """Places of a bias tile in its flat values, int64 broadcastable to [n, g, r, rows, L]; `inside`: they exist."""

    place: Tensor
    inside: Tensor | None

    @staticmethod
    def of(bias: Bias, at: Tokens) -> Lookup:
        """Where the values of `bias` for the tokens of a tile lie."""
        q, k = at.q.clamp(min=0)[None, :, None, :, None], at.k.clamp(min=0)[None, :, None, None, :]
        heads = at.heads[:, None, :, None, None]  # [n, 1, r, 1, 1]
        if isinstance(bias, DenseBias):
            axes = (at.sample[:, None, None, None, None], heads, q, k)
            place, step = torch.zeros(1, 1, 1, 1, 1, dtype=torch.long, device=q.device), 1
            for size, axis in zip(reversed(bias.values.shape), reversed(axes), strict=True):
                if size > 1:
                    place = place + axis * step
                step *= size
            return Lookup(place, None)
        width = bias.table.shape[1]
        place = bias.k_code[k] - bias.q_code[q]
        inside = (place >= 0) & (place < width)
        place = torch.where(inside, place, 0)
        return Lookup(place if bias.table.shape[0] == 1 else place + heads * width, inside)

    def read(self, bias: Bias, dtype: torch.dtype) -> Tensor:
        """The tile of values."""
        values = (bias.values if isinstance(bias, DenseBias) else bias.table).reshape(-1)
        found = values[self.place].to(dtype)
        return found if self.inside is None else torch.where(self.inside, found, 0)

    def write(self, grad: Tensor, grad_s: Tensor) -> None:
        """Add the gradient of a tile, [n, g, r, rows, L], to the flat gradient of the values."""
        if self.inside is not None:
            grad_s = torch.where(self.inside, grad_s, 0)
        grad.index_add_(0, self.place.flatten(), grad_s.sum_to_size(self.place.shape).flatten())


def additive(call: Call, at: Tokens, ids: Tensor | None, rows: MaskRows, shared: int, padded: bool) -> Tensor | None:
    """Everything added to the logits of a tile, [n|1, g, R, L], or None if nothing is.

    ids: mask rows of the chunk. padded: some key slots of the plan are empty.
    """
    dtype, r = rows.dtype, at.heads.shape[1]
    add = None if ids is None else rows.add(ids, shared)[:, :, None]  # [1, g, 1, rows, L]
    terms = [] if add is None else [add]
    if padded:
        terms.append(_hidden((at.k < 0)[None, :, None, None, :], dtype))
    if call.segments is not None:
        mine, theirs = (s[at.sample] for s in call.segments)  # [n, N]
        mine, theirs = mine[:, at.q.clamp(min=0)], theirs[:, at.k.clamp(min=0)]  # [n, g, rows], [n, g, L]
        differ = (mine[..., None] != theirs[..., None, :]) | (mine < 0)[..., None]
        terms.append(_hidden(differ, dtype)[:, :, None])
    terms += [Lookup.of(bias, at).read(bias, dtype) for bias in call.bias]
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    n, g = total.shape[:2]
    return total.expand(n, g, r, at.q.shape[1], at.k.shape[1]).reshape(n, g, -1, at.k.shape[1])


def _hidden(hide: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hide.shape, dtype=dtype, device=hide.device).masked_fill_(hide, -torch.inf)


def tile_forward(q: Tensor, k: Tensor, v: Tensor, add: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """out [n, g, R, Dv] and LSE [n, g, R] of one tile; rows that see nothing get 0 and -inf."""
    if q.device.type == "cpu" and call.softcap is None:
        out, lse = _flash(q, k, v, add, call.scale)
    else:
        out, lse = _explicit(q, k, v, add, call)
    if add is not None:
        empty = add.amax(-1) == -torch.inf
        if bool(empty.any()):
            empty = empty.expand(lse.shape)
            out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, add: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    d, dv = q.shape[-1], v.shape[-1]
    if dv < d:
        v = pad(v, (0, d - dv))
    elif d < dv:
        q, k = pad(q, (0, dv - d)), pad(k, (0, dv - d))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))  # the kernel takes no other stride
    out, lse = _FLASH(q, k, v, attn_mask=add, scale=scale)
    return out[..., :dv], lse


def _explicit(q: Tensor, k: Tensor, v: Tensor, add: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    s = q @ k.transpose(-1, -2) * call.scale  # [n, g, R, L]
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if add is not None:
        s = s + add
    top = s.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    return e @ v / total.masked_fill(total == 0, 1), (top + total.log()).squeeze(-1)


@dataclass(frozen=True, eq=False)
class TileGrads:
    """Gradients of one tile; `bias` is that of the logits after the soft-cap, where biases are added: [n, g, R, L]."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class RowGrads:
    """What backward knows of each row: grad of out, LSE with +inf for empty rows, delta = grad . out - grad of LSE."""

    out: Tensor
    lse: Tensor
    delta: Tensor


def tile_backward(q: Tensor, k: Tensor, v: Tensor, add: Tensor | None, rows: RowGrads, call: Call) -> TileGrads:
    """dS = P (dP - delta + dLSE) and the chain rule through soft-cap and both products.

    Hidden pairs get exact zeros where a row holds NaN, so that a NaN stays with its row.
    """
    q = q * call.scale
    s = q @ k.transpose(-1, -2)  # [n, g, R, L]
    tanh = None
    if call.softcap is not None:
        tanh = torch.tanh(s / call.softcap)
        s = call.softcap * tanh
    if add is not None:
        s = s.add_(add)
    p = s.sub_(rows.lse[..., None]).exp_()
    hidden = None
    if add is not None and not bool(rows.delta.isfinite().all()):
        hidden = (add == -torch.inf).expand(p.shape)
        p = p.masked_fill_(hidden, 0)
    grad_v = p.transpose(-1, -2) @ rows.out
    grad_bias = (rows.out @ v.transpose(-1, -2)).sub_(rows.delta[..., None]).mul_(p)
    if hidden is not None:
        grad_bias = grad_bias.masked_fill_(hidden, 0)
    grad_s = grad_bias if tanh is None else grad_bias * (1 - tanh.square())
    return TileGrads((grad_s @ k).mul_(call.scale), grad_s.transpose(-1, -2) @ q, grad_v, grad_bias)
