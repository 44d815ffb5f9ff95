"""The token mixer of STViT (arXiv 2211.11167): attention among super tokens."""

from __future__ import annotations

from glocal.nn.mixer import register_mixer
from glocal.nn.super_tokens import SuperTokenAttention


@register_mixer("stvit")
def super_tokens(dim: int, heads: int, cell: int = 4, iterations: int = 1) -> SuperTokenAttention:
    """Super token attention, x: [B, H, W, dim]. cell: pixels a side of a cell. iterations: of the assignment."""
    return SuperTokenAttention(dim, heads, cell, iterations)
