"""Where the gradients of biases are gathered while those of q, k and v are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.kernels.call import DenseBias, TableBias
from glocal.kernels.triton.work import Work


@dataclass(frozen=True, eq=False)
class BiasGrads:
    """columns: sums of dS over queries by key slot, [B, Hq, room], for a dense bias that all queries share; no atomics.
    pairs: (dense, table) buffers that dS is added to by atomics, or None each. elsewhere: several biases of a kind, or
    bits that must not vary: plain torch makes the gradients.
    """

    columns: Tensor | None
    pairs: tuple[Any, Any]
    elsewhere: bool

    @staticmethod
    def of(w: Work, q: Tensor, k: Tensor) -> BiasGrads:
        """What the biases of a call need."""
        nothing = BiasGrads(None, (None, None), False)
        dense = [b for b in w.call.bias if isinstance(b, DenseBias)]
        tables = [b for b in w.call.bias if isinstance(b, TableBias)]
        if not w.call.bias or not w.call.bias_grad:
            return nothing
        by_key = bool(dense) and dense[0].values.shape[2] == 1
        atomics = bool(tables) or (bool(dense) and not by_key)
        if max(len(dense), len(tables)) > 1 or (atomics and torch.are_deterministic_algorithms_enabled()):
            return BiasGrads(None, (None, None), True)
        columns, pairs = None, [None, None]
        if by_key:
            columns = torch.zeros(w.batch, w.heads, w.room, dtype=torch.float32, device=q.device)
        elif dense:
            values = torch.zeros(dense[0].values.shape, dtype=torch.float32, device=q.device)
            shape = (w.batch, w.heads, q.shape[2], k.shape[2])
            pairs[0] = (values, *values.expand(shape).stride())  # type: ignore[call-overload]
        if tables:
            pairs[1] = torch.zeros(tables[0].table.shape, dtype=torch.float32, device=q.device)  # type: ignore[call-overload]
        return BiasGrads(columns, (pairs[0], pairs[1]), False)

    def result(self, w: Work, tokens: int) -> tuple[Tensor, ...]:
        """One gradient for each bias of the call, in its shape and dtype."""
        if not w.call.bias_grad:
            return ()
        return tuple(self._one(w, b, tokens) for b in w.call.bias)

    def _one(self, w: Work, bias: DenseBias | TableBias, tokens: int) -> Tensor:
        if isinstance(bias, TableBias):
            return self.pairs[1].to(bias.table.dtype)
        if self.columns is None:
            return self.pairs[0][0].to(bias.values.dtype)
        order = w.plan.kv_order.repeat_interleave(w.heads // w.plan.kv_order.shape[1], 1).expand(w.batch, -1, -1)
        to = torch.zeros(w.batch, w.heads, tokens + 1, dtype=torch.float32, device=order.device)
        to.scatter_add_(2, torch.where(order < 0, tokens, order).long(), self.columns)
        values = bias.values
        shared = to[:, :, None, :tokens]
        return shared.sum_to_size(values.shape).to(values.dtype)
