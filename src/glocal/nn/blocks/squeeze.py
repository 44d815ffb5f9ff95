"""Squeeze and excitation (arXiv 1709.01507): channels are gated by a small network on their means."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """x: [B, H, W, C] * sigmoid(fc2(act(fc1(mean of x)))).

    dim, hidden: channels of the map and of the squeeze. act: makes the activation. bias: of both layers.
    """

    def __init__(self, dim: int, hidden: int, act: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> the same shape."""
        gate = self.fc2(self.act(self.fc1(x.mean((1, 2)))))  # [B, C]
        return x * gate.sigmoid()[:, None, None]
