"""Layer norm over the last axis of channels-last maps (arXiv 1607.06450)."""

from __future__ import annotations

from torch import Tensor, nn

from glocal.ops.norm import layer_norm


class LayerNorm(nn.LayerNorm):
    """torch's layer norm over one axis, by `glocal.ops.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """x: [..., C] -> the same shape."""
        return layer_norm(input, self.weight, self.bias, self.eps)
