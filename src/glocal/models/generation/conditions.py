"""What a video model can be asked for, and how that and the noise level enter it.

A condition is one class index a field, 0 meaning "not given"; the embeddings of all fields are summed. Field names and
their values are part of the model's configuration, so weights say themselves what they understand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Field = tuple[str, tuple[str, ...]]
"""Name of a condition field and its values; value i is class i + 1."""


def encode_condition(fields: Sequence[Field], wanted: dict[str, str]) -> Tensor:
    """Condition [1, fields] long from names; raises ValueError for an unknown field or value."""
    names = [name for name, _ in fields]
    out = torch.zeros(1, len(names), dtype=torch.long)
    for name, value in wanted.items():
        if name not in names:
            raise ValueError(f"{name}={value!r}: unknown field; legal are {', '.join(names)}")
        values = fields[names.index(name)][1]
        if value not in values:
            raise ValueError(f"{name}={value!r}: unknown value; legal are {', '.join(values)}")
        out[0, names.index(name)] = values.index(value) + 1
    return out


class TimeEmbedding(nn.Module):
    """Noise level sigma [B] in [0, 1] -> [B, dim]: sines and cosines, then two linear maps."""

    def __init__(self, dim: int, waves: int = 64) -> None:
        super().__init__()
        self.waves = waves
        self.first = nn.Linear(2 * waves, dim)
        self.second = nn.Linear(dim, dim)

    def forward(self, sigma: Tensor) -> Tensor:
        """[B] -> [B, dim]."""
        speed = torch.logspace(0, 2, self.waves, device=sigma.device, dtype=torch.float32)
        angles = sigma.float()[:, None] * speed * (math.pi / 2)
        return self.second(F.silu(self.first(torch.cat([angles.cos(), angles.sin()], -1).to(self.first.weight.dtype))))


class AttributeEmbedding(nn.Module):
    """Sum of one embedding a field; row 0 of each field stands for "not given"."""

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.tables = nn.Embedding(sum(self.sizes) + len(self.sizes), dim)
        nn.init.normal_(self.tables.weight, std=0.2)

    def forward(self, condition: Tensor | None, batch: int) -> Tensor:
        """condition [B, fields] or [1, fields] long, or None for nothing given -> [B, dim]."""
        device = self.tables.weight.device
        if condition is None:
            condition = torch.zeros(1, len(self.sizes), dtype=torch.long, device=device)
        if condition.ndim != 2 or condition.shape[1] != len(self.sizes) or condition.shape[0] not in (1, batch):
            raise ValueError(
                f"condition has shape {tuple(condition.shape)}: need [{batch}, {len(self.sizes)}], one column a field"
            )
        first = [sum(self.sizes[:i]) + i for i in range(len(self.sizes))]
        rows = condition.to(device) + torch.tensor(first, dtype=torch.long, device=device)
        return self.tables(rows).sum(1).expand(batch, -1)
