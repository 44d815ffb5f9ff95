"""The two attentions of DaViT (arXiv 2204.03645): windows of tokens in even blocks, groups of channels in odd ones."""

from __future__ import annotations

from glocal.nn.channel_attention import ChannelAttention, ChannelForm
from glocal.nn.mixer import register_mixer
from glocal.nn.window_attention import WindowAttention


@register_mixer("davit")
def dual_attention(
    dim: int, heads: int, block: int = 0, window: int = 7, form: ChannelForm = "v1"
) -> WindowAttention | ChannelAttention:
    """Attention of one block, x: [B, H, W, dim]. window: side of the windows. form: as in `ChannelAttention`."""
    return ChannelAttention(dim, heads, form) if block % 2 else WindowAttention(dim, heads, window)
