"""The two attentions of L2ViT (arXiv 2501.16182): windows in even blocks, linear attention over the map in odd ones."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.nn.blocks.windows import to_windows
from glocal.nn.linear_attention import EnhancedLinearAttention
from glocal.nn.mixer import register_mixer
from glocal.nn.window_attention import WindowAttention, hide


class UnpaddedWindowAttention(WindowAttention):
    """Window attention in which the tokens that pad a map to whole windows are no keys. It is not rolled."""

    def whole(self, size: tuple[int, int], real: tuple[int, int]) -> bool:
        """Padding is hidden, which the pattern does not say."""
        return size == real

    def bias(self, q: Tensor, real: tuple[int, int], size: tuple[int, int]) -> Tensor | None:
        """As in `WindowAttention`; -inf for padding."""
        if real == size:
            return super().bias(q, real, size)
        there = torch.zeros(1, *size, 1, dtype=torch.bool, device=q.device)
        there[:, : real[0], : real[1]] = True
        kept = to_windows(there, (self.window, self.window))[0].transpose(1, 2)  # [windows, 1, N]
        return hide(q, kept, super().bias(q, real, size))


@register_mixer("l2vit")
def alternating(dim: int, heads: int, block: int = 0, window: int = 7) -> WindowAttention | EnhancedLinearAttention:
    """Attention of one block, x: [B, H, W, dim]. window: side of the windows. The convolutions that L2ViT adds behind
    linear attention have a norm of their own and belong to its block.
    """
    return EnhancedLinearAttention(dim, heads) if block % 2 else WindowAttention(dim, heads, window)
