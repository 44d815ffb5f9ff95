"""STViT (arXiv 2211.11167): super token attention in early stages, dense attention in late ones.

Convolutions surround it: a deep stem, a depthwise one before every block and one in every feed-forward part.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import VisionBackbone
from glocal.nn.blocks import (
    DropPath,
    LayerNorm,
    conv,
    drop_rates,
    init_linears,
    to_nhwc,
)
from glocal.nn.mixer import begin, mixer
from glocal.nn.super_tokens import Refine, SuperTokenAttention


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    mlp_ratio: hidden over outer channels. layer_scale: start of the learned factors in the stages that have them.
    refine: how super tokens exchange. mixer: another token mixer by name or "file.py:Class" in every block.
    """

    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_scale: float = 1e-6
    refine: Refine = "attention"
    mixer: str | None = None


class ResidualConv(nn.Module):
    """x plus its 3 x 3 depthwise convolution; key `conv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        return conv(self.conv, x, residual=True)


class FeedForward(nn.Module):
    """1 x 1 convolution, GELU, residual depthwise convolution, 1 x 1 convolution; keys `fc1`, `conv`, `fc2`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.conv = ResidualConv(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        return conv(self.fc2, self.conv(self.act(conv(self.fc1, x))))


class Block(nn.Module):
    """x += convolution(x); x += attention(LayerNorm(x)); x += feed-forward(BatchNorm(x)).

    layer_scale: whether both halves have learned factors `gamma_1`, `gamma_2` [1, dim, 1, 1].
    """

    def __init__(self, dim: int, attn: nn.Module, layer_scale: bool, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = ResidualConv(dim)
        self.norm1 = nn.ModuleDict({"norm": LayerNorm(dim, eps=1e-6)})
        self.attn = attn
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = FeedForward(dim, int(dim * spec.mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), spec.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), spec.layer_scale))

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = self.pos_embed(x)
        x = x + self.drop_path(_factored(self.attn(self.norm1["norm"](x), stage), self.gamma_1))
        return x + self.drop_path(_factored(self.mlp2(conv(self.norm2, x)), self.gamma_2))


class Layers(nn.Module):
    """Convolutions one after the other under the key `proj`, over channels-last maps."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, h, w, C']."""
        return conv(self.proj, x)


class Level(nn.Module):
    """The blocks of one stage, and the merging behind them (None after the last)."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class STViT(VisionBackbone):
    """The backbone.

    dims, depths, heads, cells, iterations, layer_scales: one entry a stage; a cell of 1 is dense attention.
    projection: channels before the classifier. drop_path: rate of the last block. The fixed 3 x 3 kernels that
    published checkpoints store in every block (`unfold.weights`, `fold.weights`) hold no weights and are left aside.
    """

    ignored: ClassVar[tuple[str, ...]] = ("unfold.weights", "fold.weights")
    behind: ClassVar[tuple[str, ...]] = ("proj.",)

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 5, 9, 3),
        heads: tuple[int, ...] = (1, 2, 5, 8),
        cells: tuple[int, ...] = (8, 4, 1, 1),
        iterations: tuple[int, ...] = (1, 1, 1, 1),
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        layer_scales: tuple[bool, ...] = (False, False, False, False),
        projection: int = 1024,
        drop_path: float = 0.1,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        settings = {"depths": depths, "heads": heads, "cells": cells, "iterations": iterations}
        self.pyramid(dims, **settings, layer_scales=layer_scales)
        widths = (in_chans, dims[0] // 2, dims[0] // 2, dims[0], dims[0])
        steps = [
            (nn.Conv2d(a, b, 3, 2 - i % 2, 1), nn.GELU(), nn.BatchNorm2d(b))
            for i, (a, b) in enumerate(pairwise(widths))
        ]
        self.patch_embed = Layers(*(layer for step in steps for layer in step))
        self.layers = nn.ModuleList()
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            blocks = []
            for j, rate in enumerate(rates):
                attn = _attention(spec, dims[i], heads[i], cells[i], iterations[i], j)
                blocks.append(Block(dims[i], attn, layer_scales[i], spec, rate))
            last = i + 1 == len(dims)
            down = None if last else Layers(nn.Conv2d(dims[i], dims[i + 1], 3, 2, 1), nn.BatchNorm2d(dims[i + 1]))
            self.layers.append(Level(blocks, down))
        if not features_only:
            self.proj = nn.Conv2d(dims[-1], projection, 1)
            self.norm = nn.BatchNorm2d(projection)
            self.head = self.make_head(projection)
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all stages, channels last; none is normalised."""
        x, maps = self.patch_embed(to_nhwc(image)), []
        for level in self.layers:
            assert isinstance(level, Level)
            stage = begin((block.attn for block in level.blocks), x)  # type: ignore[misc]
            for block in level.blocks:
                x = self.run(block, x, stage)
            maps.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the projected, normalised and activated tokens."""
        return nn.functional.silu(conv(self.norm, conv(self.proj, last))).mean((1, 2))


def _factored(x: Tensor, factor: Tensor | None) -> Tensor:
    """x: [B, H, W, C] times a factor [1, C, 1, 1]."""
    return x if factor is None else x * factor.flatten()


def _attention(spec: BlockSpec, dim: int, heads: int, cell: int, iterations: int, index: int) -> nn.Module:
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    return SuperTokenAttention(dim, heads, cell, iterations, spec.refine, spec.qkv_bias)


# fmt: off
_SCALED = (False, False, True, True)
_BASE = {"dims": (96, 192, 384, 512), "depths": (4, 6, 14, 6), "heads": (2, 3, 6, 8), "layer_scales": _SCALED}
_LARGE = {"dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "heads": (2, 3, 7, 10), "layer_scales": _SCALED}
_NOTE = "parameters without the fixed kernels that checkpoints store"
VARIANTS = (
    Variant("stvit_small", "stvit", {}, 25_495_624, 4.35, 83.6, note=_NOTE),
    Variant("stvit_base", "stvit", {**_BASE, "drop_path": 0.4}, 51_691_288, 9.84, 84.8, note=_NOTE),
    Variant("stvit_large", "stvit", {**_LARGE, "drop_path": 0.6}, 94_971_096, 15.56, 85.3, note=_NOTE),
    Variant("stvit_small_384", "stvit", {}, 25_495_624, 14.11, 85.0, size=384, note=_NOTE),
    Variant("stvit_base_384", "stvit", {**_BASE, "drop_path": 0.4}, 51_691_288, 31.40, 86.0, size=384, note=_NOTE),
    Variant("stvit_large_384", "stvit", {**_LARGE, "drop_path": 0.6}, 94_971_096, 49.64, 86.4, size=384, note=_NOTE),
)
# fmt: on
register_model(STViT, VARIANTS)
