"""What rectification does to the output of sparse attention: a factor and an addend for each row, beside the plan.

Rectified SpaAttn (arXiv 2511.19835) scales rows by the share of mass that was kept and adds what the dropped blocks
would have given. Both are data: the plan and the log-sum-exp stay those of the sparse softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.routing.partition import Partition


@dataclass(frozen=True, eq=False)
class Epilogue:
    """out' = row_scale * out + add, differentiable in all three.

    row_scale: [B|1, H|1, Nq]; None is 1. add: [B|1, H|1, Nq, Dv]; None is 0.
    """

    row_scale: Tensor | None = None
    add: Tensor | None = None

    def apply(self, out: Tensor) -> Tensor:
        """The rectified output for out [B, H, Nq, Dv]."""
        for name, value, shape in (("row_scale", self.row_scale, out.shape[:3]), ("add", self.add, out.shape)):
            if value is not None and any(a not in (1, b) for a, b in zip(value.shape, shape, strict=True)):
                raise ValueError(
                    f"Epilogue: {name} of shape {tuple(value.shape)} does not broadcast to {tuple(shape)}."
                )
        scaled = out if self.row_scale is None else self.row_scale[..., None].to(out.dtype) * out
        return scaled if self.add is None else scaled + self.add.to(out.dtype)

    @staticmethod
    def of_groups(part: Partition, tokens: int, row_scale: Tensor | None = None, add: Tensor | None = None) -> Epilogue:
        """One factor and addend for each query group: [B|1, H|1, groups] and [B|1, H|1, groups, Dv].

        tokens: number of queries. A token in no group keeps its output; a token in several takes the last.
        """
        slot = part.members.long().flatten(2)  # [b, h, groups * most]
        group = torch.arange(part.groups, device=slot.device).repeat_interleave(part.most).expand_as(slot)
        label = torch.full((*slot.shape[:2], tokens + 1), part.groups, device=slot.device)
        label = label.scatter(2, torch.where(slot < 0, tokens, slot), group)[..., :tokens]  # [b, h, tokens]

        def spread(values: Tensor, rest: float) -> Tensor:
            values = torch.cat([values, values.new_full((*values.shape[:2], 1, *values.shape[3:]), rest)], 2)
            b, h = (max(values.shape[i], label.shape[i]) for i in (0, 1))
            place = label.expand(b, h, -1).reshape(b, h, tokens, *(1,) * (values.dim() - 3))
            values = values.expand(b, h, *values.shape[2:])
            return values.gather(2, place.expand(b, h, tokens, *values.shape[3:]))

        return Epilogue(
            None if row_scale is None else spread(row_scale, 1.0), None if add is None else spread(add, 0.0)
        )
