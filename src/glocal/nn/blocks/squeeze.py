"""Squeeze and excitation (arXiv 1709.01507): channels are gated by a small network on their means."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """x: [B, H, W, C] * sigmoid(fc2(act(fc1(mean of x)))).

    dim, hidden: channels of the map and of the squeeze. act: makes the activation. bias: of both layers. pointwise:
    their weights have the shape of 1 x 1 convolutions, as many checkpoints store them.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        act: Callable[[], nn.Module] = nn.ReLU,
        bias: bool = True,
        pointwise: bool = False,
    ) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=bias) if pointwise else nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=bias) if pointwise else nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> the same shape."""
        mean = x.mean((1, 2))  # [B, C]
        gate = self.fc2(self.act(self.fc1(mean[:, :, None, None] if self.pointwise else mean)))
        return x * gate.sigmoid().reshape(mean.shape)[:, None, None]
