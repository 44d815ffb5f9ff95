"""SG-Former (arXiv 2308.12216): hybrid-scale and self-guided attention alternate; plain attention in the last stage.

Any image size: attentions pad by the rules of `glocal.nn.sg_former`, positions are resized. At multiples of 224 px
nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, isqrt, sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import VisionBackbone, laid_out
from glocal.nn.blocks import (
    ConvMlp,
    DropPath,
    LayerNorm,
    conv,
    drop_rates,
    init_linears,
    to_nhwc,
)
from glocal.nn.blocks.absolute import resize_positions, sincos_positions
from glocal.nn.mixer import begin, mixer
from glocal.nn.sg_former import self_guided


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    mlp_ratio: hidden over outer channels. drop: dropout in the feed-forward part. mixer: another token mixer by name
    or "file.py:Class".
    """

    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop: float = 0.0
    mixer: str | None = None


class NormedConv(nn.Module):
    """A convolution without bias, then a norm over all channels and places of an image; keys `c`, `bn`.

    The norm is a group norm of one group, whatever its key says: it has no running statistics.
    """

    def __init__(self, dim: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.GroupNorm(1, out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, dim, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        return self.bn(self.c(x))


class Stem(nn.Module):
    """Three 3 x 3 convolutions of strides 2, 1, 2 with GELU between, then LayerNorm; keys `conv.{0,2,4}`, `norm`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        convs = (NormedConv(in_chans, dim, 3, 2), NormedConv(dim, dim, 3), NormedConv(dim, dim, 3, 2))
        self.conv = nn.Sequential(convs[0], nn.GELU(), convs[1], nn.GELU(), convs[2])
        self.norm = LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), dim]."""
        return self.norm(to_nhwc(self.conv(image)))


class Merge(nn.Module):
    """1 x 1, 3 x 3 depthwise of stride 2, and 1 x 1 convolutions with GELU between; keys `conv1` to `conv3`."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = NormedConv(dim, out), NormedConv(out, out, 3, 2, groups=out)
        self.conv3 = NormedConv(out, out)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out]."""
        x = self.act(conv(self.conv1, x))
        return conv(self.conv3, self.act(conv(self.conv2, x)))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); keys `norm1`, `attn`, `norm2`, `mlp`."""

    def __init__(self, dim: int, attn: nn.Module, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim, 1e-6), LayerNorm(dim, 1e-6)
        self.attn = attn
        self.mlp = ConvMlp(dim, int(dim * spec.mlp_ratio), drop=spec.drop, residual=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), stage))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SGFormer(VisionBackbone):
    """The backbone.

    dims, depths, heads, reductions: one entry a stage. A reduction is 8, 4, 2, or 1 for plain attention; where it is
    not 1 the depth is even, because blocks work in pairs. size: px of the square image that positions are stored for.
    drop_path: rate of the last block. The maps have been normalised, as their merging and the authors' dense models
    read them.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("pos_embed",)

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 4, 16, 1),
        heads: tuple[int, ...] = (2, 4, 8, 16),
        reductions: tuple[int, ...] = (8, 4, 2, 1),
        size: int = 224,
        drop_path: float = 0.1,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.pyramid(dims, depths=depths, heads=heads, reductions=reductions)
        odd = [i for i, (depth, r) in enumerate(zip(depths, reductions, strict=True)) if r > 1 and depth % 2]
        if odd and spec.mixer is None:
            raise ValueError(
                f"SGFormer: depths={tuple(depths)} must be even where a reduction is above 1, blocks work in pairs; "
                f"stage {odd[0]} could have {depths[odd[0]] + 1}."
            )
        side = ceil(size / 4)
        self.pos_embed = nn.Parameter(torch.empty(1, side**2, dims[0]))
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(dims[0], side, side))
        self.patch_embed1 = Stem(in_chans, dims[0])
        for i, (a, b) in enumerate(pairwise(dims), 2):
            self.add_module(f"patch_embed{i}", Merge(a, b))
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            attns = [_attention(dims[i], heads[i], reductions[i], spec, j) for j in range(len(rates))]
            blocks = [Block(dims[i], attn, spec, rate) for attn, rate in zip(attns, rates, strict=True)]
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", LayerNorm(dims[i], 1e-6))
        self.head = nn.Identity() if features_only else self.make_head(dims[-1])
        init_linears(self)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                fan = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
                nn.init.normal_(layer.weight, std=sqrt(2 / fan))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, normalised, channels last."""
        x, maps = image, []
        for i in range(1, len(self.channels) + 1):
            x = self.get_submodule(f"patch_embed{i}")(x)
            if i == 1:
                places = resize_positions(self.pos_embed, isqrt(self.pos_embed.shape[1]), (x.shape[1], x.shape[2]))
                x = x + places.unflatten(1, x.shape[1:3])
            blocks = list(self.get_submodule(f"block{i}").children())
            stage = begin((block.get_submodule("attn") for block in blocks), x)
            for block in blocks:
                x = self.run(block, x, stage)
            x = self.get_submodule(f"norm{i}")(x)
            maps.append(x)
        return maps

    def features(self, image: Tensor) -> list[Tensor]:
        """The levels as [B, channels[i], h, w]; `maps` are normalised already."""
        self._check(image)
        return [each.permute(0, 3, 1, 2) for each in self.maps(laid_out(image))]

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the tokens."""
        return last.mean((1, 2))


def _attention(dim: int, heads: int, reduction: int, spec: BlockSpec, index: int) -> nn.Module:
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    return self_guided(dim, heads, index, reduction, spec.qkv_bias)


def _keywords(dim: int, depths: tuple[int, ...], heads: tuple[int, ...], drop_path: float) -> dict[str, object]:
    """Keywords of a published model; dims double."""
    return {"dims": tuple(dim * 2**i for i in range(4)), "depths": depths, "heads": heads, "drop_path": drop_path}


# fmt: off
VARIANTS = (
    Variant("sgformer_s", "sg_former", _keywords(64, (2, 4, 16, 1), (2, 4, 8, 16), 0.1), 22_545_981, 4.8, 83.2),
    Variant("sgformer_m", "sg_former", _keywords(64, (2, 6, 28, 2), (2, 4, 8, 16), 0.2), 38_689_316, 7.5, 84.1),
    Variant("sgformer_b", "sg_former", _keywords(96, (4, 6, 24, 2), (4, 6, 12, 24), 0.4), 77_950_293, 15.6, 84.7),
)
# fmt: on
register_model(SGFormer, VARIANTS)
