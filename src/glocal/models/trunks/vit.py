"""ViT (arXiv 2010.11929) and DeiT (2012.12877) under timm's key names; other systems put their attention into it."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks._blocks import Block
from glocal.models.vision.base import VisionBackbone, laid_out
from glocal.nn._heads import check_heads, split_heads
from glocal.nn.blocks import LayerNorm, PatchEmbed, drop_rates, init_linears


class ViTShape(VisionBackbone):
    """One level of tokens, a class token, learned positions; `attention` says what is in the blocks.

    Positions are stored for one size; others interpolate them (bicubic, a rule of ours).
    """

    undecayed = ("pos_embed", "cls_token")

    @abstractmethod
    def attention(self, index: int) -> nn.Module:
        """The attention of block `index`; it is called with tokens [B, 1 + h * w, dim] and (h, w)."""

    def build(self, dim: int, depth: int, patches: tuple[int, int], mlp_ratio: float, drop_path: float) -> None:
        """Add embedding, positions, blocks and head. patches: px of a patch, patches a side."""
        patch, self.side = patches
        self.channels, self.strides = (dim,), (patch,)
        self.patch_embed = PatchEmbed(self.in_chans, dim, patch, norm=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        rates = drop_rates(drop_path, (depth,))[0]
        self.blocks = nn.ModuleList(
            Block(dim, self.attention(j), mlp_ratio, rate, eps=1e-6) for j, rate in enumerate(rates)
        )
        self.norm = LayerNorm(dim, eps=1e-6)
        self.head = nn.Identity() if self.features_only else self.make_head(dim)
        for start in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(start, std=0.02)
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """The one map of normalised tokens, channels last."""
        tokens, (height, width) = self.tokens(image)
        return [tokens[:, 1:].unflatten(1, (height, width))]

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised tokens [B, 1 + h * w, dim], the class token first, and (h, w)."""
        x = self.patch_embed(image)
        size = (x.shape[1], x.shape[2])
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), 1)
        place = resized(self.pos_embed[:, 1:], self.side, size, "bicubic")
        x = x + torch.cat((self.pos_embed[:, :1], place), 1)
        for block in self.blocks:
            x = self.run(block, x, size)
        return self.norm(x), size

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """As in `VisionBackbone`; the classifier reads the class token."""
        if self.features_only:
            return self.features(image)
        self._check(image)
        return self.head(self.tokens(laid_out(image))[0][:, 0])

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the tokens of the map, for uses without the class token."""
        return last.mean((1, 2))


class TokenAttention(nn.Module):
    """Dense multi-head attention over tokens; keys `qkv`, `proj`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads("TokenAttention", dim, heads)
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, N, dim] -> the same shape; `stage` is unused."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViT(ViTShape):
    """Dense attention in every block. img_size: px a side that positions are stored for. patch: px of a patch."""

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        img_size: int = 224,
        patch: int = 16,
        drop_path: float = 0.1,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self._dim, self._heads = dim, heads
        self.build(dim, depth, (patch, img_size // patch), 4.0, drop_path)

    def attention(self, index: int) -> nn.Module:
        """Dense attention."""
        return TokenAttention(self._dim, self._heads)


def resized(table: Tensor, side: int, size: tuple[int, int], mode: str) -> Tensor:
    """Positions [1, side * side, C] interpolated to a map of `size` tokens, [1, h * w, C]."""
    if size == (side, side):
        return table
    grid = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=size, mode=mode, align_corners=False).flatten(2).transpose(1, 2)


register_model(
    ViT,
    (
        Variant("deit_tiny", "", {}, 5_717_416, 1.26, 72.2),
        Variant("deit_small", "", {"dim": 384, "heads": 6}, 22_050_664, 4.61, 79.8),
        Variant("deit_base", "", {"dim": 768, "heads": 12}, 86_567_656, 17.58, 81.8),
    ),
)
