"""LITv2 (arXiv 2205.13213): convolutional feed-forward blocks on large maps, HiLo attention on small ones.

The published classifier runs at one square size, the published dense-prediction class at any; this one class is both.
Merging drops an odd last row or column, as theirs does, so maps have floor(side / 2) a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import VisionBackbone, doubled, per_stage
from glocal.nn.blocks import (
    ConvMlp,
    DepthwiseConv,
    DropPath,
    LayerNorm,
    PatchEmbed,
    drop_rates,
    init_linears,
)
from glocal.nn.blocks.deformable import DeformableMerge
from glocal.nn.hilo import HiLo
from glocal.nn.mixer import begin, mixer


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    windows: of HiLo, one entry a level; 0 is a level without attention, 1 dense attention. The authors take 4 in level
    2 for large images. alpha: share of the Lo-Fi heads. mixer: another token mixer by name or "file.py:Class", in the
    levels that have attention.
    """

    windows: tuple[int, ...] = (0, 0, 2, 1)
    alpha: float = 0.9
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop: float = 0.0
    mixer: str | None = None


class Block(nn.Module):
    """x + attention(norm1(x)) where there is attention, then x + mlp(norm2(x)); the mlp has a depthwise convolution."""

    def __init__(self, dim: int, attn: nn.Module | None, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        self.attn = attn
        if attn is not None:
            self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = ConvMlp(dim, int(dim * spec.mlp_ratio), drop=spec.drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x), stage))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Level(nn.Module):
    """The blocks of one level, and the merging behind them (None after the last)."""

    def __init__(self, blocks: list[Block], downsample: DeformableMerge | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class LITv2(VisionBackbone):
    """The backbone, images of 32 px or more a side.

    dim: channels of the first level, doubled at every next one. depths, heads: one entry a level. drop_path: rate of
    the last block. spec: what blocks share. With `features_only` all levels but the first have norms, as in the
    published dense-prediction class.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        drop_path: float = 0.2,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        count = len(depths)
        heads, windows = (per_stage(n, v, count, "LITv2") for n, v in (("heads", heads), ("windows", spec.windows)))
        self.pyramid(doubled(dim, count))
        self.patch_embed = PatchEmbed(in_chans, dim)
        self.pos_drop = nn.Dropout(spec.drop)
        levels = []
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            width = self.channels[i]
            attns = [_attention(width, heads[i], windows[i], spec, j) for j in range(len(rates))]
            blocks = [Block(width, attn, spec, rate) for attn, rate in zip(attns, rates, strict=True)]
            levels.append(Level(blocks, DeformableMerge(width, 2 * width) if i < count - 1 else None))
        self.layers = nn.ModuleList(levels)
        if features_only:
            for i, width in enumerate(self.channels[1:], 1):
                self.add_module(f"norm{i}", LayerNorm(width))
        else:
            self.norm = LayerNorm(self.channels[-1])
            self.head = self.make_head(self.channels[-1])
        init_linears(self)
        for layer in self.modules():
            if isinstance(layer, DepthwiseConv):
                nn.init.normal_(layer.dwconv.weight, std=sqrt(2 / 9))  # fan out of a depthwise 3 x 3
                assert layer.dwconv.bias is not None
                nn.init.zeros_(layer.dwconv.bias)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, channels last."""
        x, maps = self.pos_drop(self.patch_embed(image)), []
        for level in self.layers:
            assert isinstance(level, Level)
            blocks = [block for block in level.blocks if isinstance(block, Block)]
            stage = begin((block.attn for block in blocks if block.attn is not None), x)
            for block in blocks:
                x = self.run(block, x, stage)
            maps.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the normalised tokens."""
        return self.norm(last).mean((1, 2))


def _attention(dim: int, heads: int, window: int, spec: BlockSpec, index: int) -> nn.Module | None:
    if window == 0:
        return None
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    return HiLo(dim, heads, window, spec.alpha, spec.qkv_bias)


def _keywords(dim: int, deep: int, drop_path: float, alpha: float = 0.9) -> dict[str, object]:
    """Keywords of a published model; heads have 32 channels."""
    return {
        "dim": dim,
        "depths": (2, 2, deep, 2),
        "heads": tuple(dim * 2**i // 32 for i in range(4)),
        "drop_path": drop_path,
        "spec": BlockSpec(alpha=alpha),
    }


# fmt: off
VARIANTS = (
    Variant("litv2_s", "hilo", _keywords(96, 6, 0.2), 27_844_000, 3.72, 82.0),
    Variant("litv2_m", "hilo", _keywords(96, 18, 0.3), 48_830_368, 7.46, 83.3),
    Variant("litv2_b", "hilo", _keywords(128, 18, 0.5), 86_520_704, 13.17, 83.6),
    Variant("litv2_b_384", "hilo", _keywords(128, 18, 0.5), 86_520_704, 39.7, 84.7, size=384),
    Variant("litv2_s_alpha_0", "hilo", _keywords(96, 6, 0.2, 0.0), 28_089_760, 3.97, 81.16),
    Variant("litv2_s_alpha_02", "hilo", _keywords(96, 6, 0.2, 0.2), 27_844_000, 3.88, 81.89),
    Variant("litv2_s_alpha_04", "hilo", _keywords(96, 6, 0.2, 0.4), 27_696_544, 3.82, 81.81),
    Variant("litv2_s_alpha_05", "hilo", _keywords(96, 6, 0.2, 0.5), 27_647_392, 3.77, 81.88),
    Variant("litv2_s_alpha_07", "hilo", _keywords(96, 6, 0.2, 0.7), 27_696_544, 3.74, 81.94),
    Variant("litv2_s_alpha_1", "hilo", _keywords(96, 6, 0.2, 1.0), 28_089_760, 3.75, 81.89,
            note="multiply-adds of the released code; its table says 3.70"),
)
# fmt: on
register_model(LITv2, VARIANTS)
