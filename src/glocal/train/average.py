"""Exponential moving average of parameters, with a short memory at the start (arXiv 2006.11239)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """Float32 means of a module's parameters: mean += (1 - d) * (value - mean), d = min(decay, (1+n) / (10+n))."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay}: must lie in 0 <= decay < 1; 0.999 is usual")
        self.decay = decay
        self.count = 0
        self.means = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the present parameters."""
        kept = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        named = dict(model.named_parameters())
        if not named:
            return
        means, values = ([found[name] for name in named] for found in (self.means, named))
        torch._foreach_lerp_(means, [value.detach().float() for value in values], 1 - kept)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the means into `model`."""
        for name, value in model.named_parameters():
            value.copy_(self.means[name])

    def state(self) -> dict[str, int | dict[str, Tensor]]:
        """What `load` needs to go on exactly."""
        return {"count": self.count, "means": self.means}

    def load(self, state: dict) -> None:
        """Go on from `state`."""
        self.count = state["count"]
        for name, mean in self.means.items():
            mean.copy_(state["means"][name])
