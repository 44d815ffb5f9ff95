"""The attention of NAT (arXiv 2204.07143) and DiNAT (arXiv 2209.15001) blocks.

Neighbourhood attention with a relative bias, the same on a dilated grid in every other block. Maps smaller than
window x dilation are padded with zeros before the qkv projection; padded tokens are ordinary keys, as in the code the
published weights were trained with.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from glocal.nn.mixer import register_mixer
from glocal.nn.neighborhood import NeighborhoodAttention2d, NeighborhoodSpec


@register_mixer("dinat")
class DilatedNeighborhoodAttention(NeighborhoodAttention2d):
    """Attention of one block, x: [B, H, W, dim].

    window: side of the neighbourhood. dilation: None is 1 in even blocks and 4 in odd ones; published models use the
    largest a map allows, floor(map / window). scale: of the logits, None is head size ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        block: int = 0,
        window: int = 7,
        dilation: int | None = None,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        if dilation is None:
            dilation = 1 if block % 2 == 0 else 4
        spec = NeighborhoodSpec(small_maps="pad", scale=scale, attn_drop=attn_drop, proj_drop=proj_drop)
        super().__init__(dim, heads, window, dilation=dilation, relative_bias=True, spec=spec)

    def macs(self, x: Tensor) -> int:
        """Multiply-adds of the layer on x: [B, H, W, dim]: projections, and window ** 2 keys for every token."""
        tokens = x.shape[0]
        for length, window, dilation in zip(x.shape[1:3], self.window, self.dilation, strict=True):
            tokens *= max(length, window * dilation)
        return tokens * (3 * self.dim**2 + 2 * prod(self.window) * self.dim) + x.shape[:3].numel() * self.dim**2
