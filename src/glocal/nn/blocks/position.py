"""Conditional positional encoding (arXiv 2102.10882): a depthwise convolution tells tokens where they lie."""

from __future__ import annotations

from torch import Tensor, nn

from glocal.nn.blocks.layout import conv


class ConvPosition(nn.Module):
    """x + act(depthwise convolution of x) under the key `proj`; zero padding makes borders visible to the tokens.

    dim: channels. kernel: odd side of the convolution. act: an activation on the convolution's output, or None.
    """

    def __init__(self, dim: int, kernel: int = 3, act: nn.Module | None = None) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"ConvPosition: kernel={kernel} must be odd, for example {kernel + 1}.")
        self.proj = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        if self.act is None:
            return conv(self.proj, x, residual=True)
        return x + self.act(conv(self.proj, x))
