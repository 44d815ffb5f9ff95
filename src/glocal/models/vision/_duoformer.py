"""The transformers of DuoFormer (arXiv 2506.12982): the released one, and the one of the first version (2407.13920)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glocal.nn.blocks import (
    LayerNorm,
    Mlp,
)
from glocal.nn.blocks.absolute import resize_positions
from glocal.nn.duoformer import GroupAttention, TwofoldAttention

Run = Callable[..., Any]


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks share.

    bare: the blocks among regions are attention alone, as released: no norm, residual or feed-forward part. Off, they
    are like those over scales, as the paper describes them. norm: the classifier reads the normalised class token;
    off, the weights of `fc_norm` are there and unused, as released. layer_scale: start of its factors in the blocks
    over scales, None for none. attn_drop, drop: dropout of attention weights, and elsewhere. generation: "first" is
    `FirstFormer`, which takes neither `bare` nor `norm`.
    """

    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    bare: bool = True
    norm: bool = False
    layer_scale: float | None = None
    attn_drop: float = 0.0
    drop: float = 0.0
    generation: Literal["first", "released"] = "released"


class LayerScale(nn.Module):
    """A factor per channel, under the key `gamma`."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] -> the same shape."""
        return x * self.gamma


class ScaleBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); keys `norm1`, `attn`, `ls1`, `norm2`, `mlp`, `ls2`."""

    def __init__(self, dim: int, heads: int, spec: BlockSpec) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim, 1e-6), LayerNorm(dim, 1e-6)
        self.attn = _attention(dim, heads, spec)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio), drop=spec.drop)
        start = spec.layer_scale
        self.ls1 = nn.Identity() if start is None else LayerScale(dim, start)
        self.ls2 = nn.Identity() if start is None else LayerScale(dim, start)

    def forward(self, x: Tensor, asking: slice = slice(None)) -> Tensor:
        """x: [B, groups, N, dim] -> [B, groups, M, dim], the tokens `asking`."""
        x = x[:, :, asking] + self.ls1(self.attn(self.norm1(x), asking))
        return x + self.ls2(self.mlp(self.norm2(x)))


class BareBlock(nn.Module):
    """Attention and nothing else, under the key `attn`."""

    def __init__(self, dim: int, heads: int, spec: BlockSpec) -> None:
        super().__init__()
        self.attn = _attention(dim, heads, spec)

    def forward(self, x: Tensor, asking: slice = slice(None)) -> Tensor:
        """x: [B, groups, N, dim] -> [B, groups, M, dim], the tokens `asking`."""
        return self.attn(x, asking)


def _attention(dim: int, heads: int, spec: BlockSpec) -> GroupAttention:
    return GroupAttention(dim, heads, None, spec.qkv_bias, spec.attn_drop, spec.drop)


class Former(nn.Module):
    """What both have: positions of the tokens of a region and of regions, class token, blocks over scales, classifier.

    tokens: of a region, its summary first. grid: regions a side, which positions are stored for.
    """

    blocks: nn.ModuleList
    head: nn.Module

    def __init__(self, dim: int, tokens: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.pos_embed_for_scale = nn.Parameter(torch.zeros(1, 1, tokens, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, dim))
        for start in (self.pos_embed_for_scale, self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(start, std=0.036)

    def over_scales(self) -> nn.ModuleList:
        """The blocks inside regions."""
        return self.blocks

    def regions(self, x: Tensor, run: Run) -> Tensor:
        """x: [B, regions, tokens, dim] -> the summary of each region, [B, regions, dim]. run: calls a block."""
        x = x + self.pos_embed_for_scale
        blocks = self.over_scales()
        for i, block in enumerate(blocks):
            # Only summaries go on, so the last block computes nothing else.
            x = run(block, x, slice(0, 1)) if i == len(blocks) - 1 else run(block, x)
        return x[:, :, 0]

    def with_class(self, regions: Tensor) -> Tensor:
        """regions: [B, h, w, dim] -> the class token and they, each at its position, [B, 1, 1 + h * w, dim]."""
        b, height, width, _ = regions.shape
        x = torch.cat((self.cls_token.expand(b, -1, -1), regions.flatten(1, 2)), 1)
        return (x + resize_positions(self.pos_embed, self.grid, (height, width), extra=1))[:, None]

    def among(self, regions: Tensor, run: Run, asking: slice = slice(None)) -> Tensor:
        """regions: [B, h, w, dim] -> the tokens `asking` of the class token and the regions, [B, M, dim]."""
        raise TypeError(f"{type(self).__name__} must define among().")


class MultiscaleFormer(Former):
    """The released transformer: `scaleBlocks` inside regions, then `blocks` among them, each a chain."""

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        tokens: int = 22,
        grid: int = 7,
        spec: BlockSpec = BlockSpec(),
        head: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, tokens, grid)
        self.norm = spec.norm
        kind = BareBlock if spec.bare else ScaleBlock
        self.scaleBlocks = nn.ModuleList([ScaleBlock(dim, heads, spec) for _ in range(depth)])
        self.blocks = nn.ModuleList([kind(dim, heads, spec) for _ in range(depth)])
        self.fc_norm = LayerNorm(dim, 1e-6)
        self.head = nn.Identity() if head is None else head

    def over_scales(self) -> nn.ModuleList:
        """The blocks inside regions."""
        return self.scaleBlocks

    def among(self, regions: Tensor, run: Run, asking: slice = slice(None)) -> Tensor:
        """regions: [B, h, w, dim] -> the tokens `asking` of the class token and the regions, [B, M, dim]."""
        x = self.with_class(regions)
        for i, block in enumerate(self.blocks):
            x = run(block, x, asking) if i == len(self.blocks) - 1 else run(block, x)
        return self.fc_norm(x[:, 0]) if self.norm else x[:, 0]


class FirstBlock(ScaleBlock):
    """A block over scales that also holds an attention among regions, in one layer `attn` with both."""

    def __init__(self, dim: int, heads: int, spec: BlockSpec) -> None:
        super().__init__(dim, heads, spec)
        self.attn = TwofoldAttention(dim, heads, spec.qkv_bias, spec.attn_drop, spec.drop)

    def among(self, x: Tensor, asking: slice = slice(None)) -> Tensor:
        """Attention among regions alone: x: [B, 1, N, dim] -> [B, 1, M, dim], the tokens `asking`."""
        return self.attn.among(x, asking)


class FirstFormer(Former):
    """The transformer of the first version: `blocks` hold both attentions.

    All blocks inside regions run first. Among regions, the first block makes tokens and every later one starts from
    those same tokens, so that only the last one's result counts: the attentions in between have weights and no effect.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        tokens: int = 22,
        grid: int = 7,
        spec: BlockSpec = BlockSpec(),
        head: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, tokens, grid)
        self.blocks = nn.ModuleList([FirstBlock(dim, heads, spec) for _ in range(depth)])
        self.norm = LayerNorm(dim, 1e-6)
        self.head = nn.Identity() if head is None else head

    def among(self, regions: Tensor, run: Run, asking: slice = slice(None)) -> Tensor:
        """regions: [B, h, w, dim] -> the tokens `asking` of the class token and the regions, [B, M, dim]."""
        first, last = self.blocks[0], self.blocks[-1]
        assert isinstance(first, FirstBlock) and isinstance(last, FirstBlock)
        x = self.with_class(regions)
        if first is last:
            return self.norm(first.among(x, asking)[:, 0])
        return self.norm(last.among(first.among(x), asking)[:, 0])
