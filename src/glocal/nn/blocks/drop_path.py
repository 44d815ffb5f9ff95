"""Stochastic depth (arXiv 1603.09382): whole residual branches are dropped, sample by sample, in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drop_path(x: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """x: [B, ...]. Each sample becomes 0 with probability `rate`, else is divided by 1 - rate."""
    if rate == 0:
        return x
    keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device, generator=generator) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


class DropPath(nn.Module):
    """`drop_path` in training, the identity in evaluation. generator: of its draws; None is torch's own."""

    def __init__(self, rate: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"DropPath: rate={rate} must lie in [0, 1).")
        self.rate, self.generator = rate, generator

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ...] -> the same shape."""
        return drop_path(x, self.rate, self.generator) if self.training else x

    def extra_repr(self) -> str:
        """The rate, for printing a model."""
        return f"rate={self.rate:.3f}"


def drop_rates(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that rise linearly from 0 to `last` over all blocks, one list a stage."""
    rates = torch.linspace(0, last, sum(depths), dtype=torch.float64, device="cpu").tolist()
    stages, start = [], 0
    for depth in depths:
        stages.append(rates[start : start + depth])
        start += depth
    return stages
