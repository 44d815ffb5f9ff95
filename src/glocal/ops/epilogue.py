"""What rectification does to the output of sparse attention: a factor and an addend for each row, beside the plan.

Rectified SpaAttn (arXiv 2511.19835) scales rows by the share of mass that was kept and adds what the dropped blocks
would have given. Both are data: the plan and the log-sum-exp stay those of the sparse softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glocal.kernels.capability import installed
from glocal.routing.partition import Partition

_LABELS: WeakKeyDictionary[Partition, Tensor] = WeakKeyDictionary()


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
    def of_groups(
        part: Partition, tokens: int, row_scale: Tensor | None = None, add: Tensor | None = None
    ) -> Epilogue | GroupEpilogue:
        """One factor and addend for each query group: [B|1, H|1, groups] and [B|1, H|1, groups, Dv].

        tokens: number of queries. A token in no group keeps its output; a token in several takes the last.
        """
        found = GroupEpilogue(part, tokens, row_scale, add)
        return found if part.shared and row_scale is not None and add is not None else found.spread()


@dataclass(frozen=True, eq=False)
class GroupEpilogue:
    """`Epilogue` with a factor and an addend for each group of queries, which are spread when they are applied."""

    part: Partition
    tokens: int
    row_scale: Tensor | None
    add: Tensor | None

    def apply(self, out: Tensor) -> Tensor:
        """The rectified output for out [B, H, tokens, Dv]; one pass on CUDA where no gradients are asked for."""
        given = (out, self.row_scale, self.add)
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        if self.row_scale is None or self.add is None or grad or not out.is_cuda or out.dtype == torch.float64:
            return self.spread().apply(out)
        b, h = out.shape[:2]
        scale, add = self.row_scale.expand(b, h, -1), self.add.expand(b, h, -1, -1)
        return rectify(out, _labels(self.part, self.tokens)[0, 0], scale, add)

    def spread(self) -> Epilogue:
        """Factor and addend of every token."""
        label = _labels(self.part, self.tokens).long()
        label = torch.where(label < 0, self.part.groups, label)

        def each(values: Tensor | None, rest: float) -> Tensor | None:
            if values is None:
                return None
            values = torch.cat([values, values.new_full((*values.shape[:2], 1, *values.shape[3:]), rest)], 2)
            b, h = (max(values.shape[i], label.shape[i]) for i in (0, 1))
            place = label.expand(b, h, -1).reshape(b, h, self.tokens, *(1,) * (values.dim() - 3))
            values = values.expand(b, h, *values.shape[2:])
            return values.gather(2, place.expand(b, h, self.tokens, *values.shape[3:]))

        return Epilogue(each(self.row_scale, 1.0), each(self.add, 0.0))


def _labels(part: Partition, tokens: int) -> Tensor:
    """Group of each token, int32 [b, h, tokens], -1 for none; kept for groups that follow from a canvas."""
    known = _LABELS.get(part) if part.fixed else None
    if known is None or known.shape[-1] != tokens:
        slot = part.members.long().flatten(2)  # [b, h, groups * most]
        group = torch.arange(part.groups, dtype=torch.int32, device=slot.device).repeat_interleave(part.most)
        known = torch.full((*slot.shape[:2], tokens + 1), -1, dtype=torch.int32, device=slot.device)
        known = known.scatter(2, torch.where(slot < 0, tokens, slot), group.expand_as(slot))[..., :tokens].contiguous()
        if part.fixed:
            _LABELS[part] = known
    return known


@torch.library.custom_op("glocal::rectify", mutates_args=())
def rectify(out: Tensor, label: Tensor, scale: Tensor, add: Tensor) -> Tensor:
    """scale * out + add by the group of each row, in float32; label int32 [N], -1 for rows that stay. Forward only.

    out: [B, H, N, D]; scale: [B, H, groups]; add: [B, H, groups, D].
    """
    if out.is_cuda and installed("triton"):
        from glocal.kernels.triton import groups

        return groups.rectify(out, label, scale, add)
    place = label.long().clamp(min=0)
    found = scale[:, :, place, None].float() * out.float() + add[:, :, place].float()
    return torch.where((label < 0)[:, None], out, found.to(out.dtype))


@rectify.register_fake
def _(out: Tensor, label: Tensor, scale: Tensor, add: Tensor) -> Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)
