"""The attentions of BiFormer (arXiv 2303.08810): bi-level routing, and what stands in its place in some stages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn._heads import check_heads
from glocal.nn.bilevel_routing import BiLevelRoutingAttention
from glocal.nn.blocks.layout import conv
from glocal.nn.mixer import register_mixer


@register_mixer("biformer")
def bilevel_routing(dim: int, heads: int, regions: int = 7, top: int = 4) -> BiLevelRoutingAttention:
    """Bi-level routing attention, x: [B, H, W, dim]. regions: a side. top: regions each one reads."""
    return BiLevelRoutingAttention(dim, heads, regions, top)


class LepeAttention(nn.Module):
    """Dense attention over a map plus a depthwise convolution: the last stage of BiFormer; keys `qkv`, `proj`, `lepe`.

    lepe: side of the convolution, 0 leaves it out. of_values: it reads the values, as the "nchw" models do, instead of
    the input. convs: projections are 1 x 1 convolutions. There is no qkv bias.
    """

    def __init__(self, dim: int, heads: int = 8, lepe: int = 5, of_values: bool = False, convs: bool = False) -> None:
        super().__init__()
        check_heads("LepeAttention", dim, heads)
        self.dim, self.heads, self.of_values = dim, heads, of_values
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False) if convs else nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Conv2d(dim, dim, 1) if convs else nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, lepe, padding=lepe // 2, groups=dim) if lepe else None

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        maps = apply(self.qkv, x).chunk(3, -1)
        q, k, v = (t.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in maps)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            out = out + conv(self.lepe, maps[2] if self.of_values else x)
        return apply(self.proj, out)


class ConvAttention(nn.Module):
    """Convolutions in the place of attention: 1 x 1, 5 x 5 depthwise, 1 x 1; keys `1`, `2`, `3`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for key, layer in enumerate(
            (nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.Conv2d(dim, dim, 1)), 1
        ):
            self.add_module(str(key), layer)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        for layer in self.children():
            x = conv(layer, x)
        return x


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of channels-last or of channels-first maps on x: [B, H, W, C]."""
    return conv(layer, x) if isinstance(layer, nn.Conv2d | nn.BatchNorm2d) else layer(x)
