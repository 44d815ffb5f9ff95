"""GC ViT (arXiv 2206.09959): window attention alternates with attention from queries pooled from the whole map.

The published classifier runs at the one size its windows are made for (224: 7, 7, 14, 7 on maps of 56, 28, 14, 7); the
published dense-prediction class takes any size. This one class is both: where the windows do not divide a map it is
padded as in the dense class, and pooled queries of another size are resized, which changes nothing at fitting sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import Rules, TableLayout, VisionBackbone, doubled, per_stage, renamed
from glocal.nn.blocks import (
    DropPath,
    LayerNorm,
    Mlp,
    conv,
    drop_rates,
    gamma,
    init_linears,
    scaled,
)
from glocal.nn.gc_vit import FusedInvertedResidual, GlobalQueries, GlobalQueryAttention
from glocal.nn.mixer import begin, mixer
from glocal.nn.window_attention import WindowAttention, WindowSpec


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    pools: halvings on the way to the global queries, one entry a level; None is 3, 2, 1, 0, with 0 for a level whose
    window is twice that of the last (the published classifiers). mlp_ratio: hidden over outer channels. layer_scale:
    start of its factors, None for none. relative_bias: False leaves the tables out. attention: biases, scale
    and dropout of the attentions. drop: dropout elsewhere. mixer: another token mixer by name or "file.py:Class".
    """

    mlp_ratio: float = 3.0
    layer_scale: float | None = None
    pools: tuple[int, ...] | None = None
    relative_bias: bool = True
    attention: WindowSpec = field(default_factory=WindowSpec)
    drop: float = 0.0
    mixer: str | None = None


class Downsample(FusedInvertedResidual):
    """Norm, inverted residual, 3 x 3 convolution of stride 2 without bias, norm; two norms of their own."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim)
        self.norm1 = LayerNorm(dim)
        self.reduction = nn.Conv2d(dim, out, 3, 2, 1, bias=False)
        self.norm2 = LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out]."""
        return self.norm2(conv(self.reduction, super().forward(self.norm1(x))))


class Stem(nn.Module):
    """A 3 x 3 convolution of stride 2 with bias, then `Downsample`; keys `proj`, `conv_down`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, 2, 1)
        self.conv_down = Downsample(dim, dim)

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), dim]."""
        return self.conv_down(self.proj(image).permute(0, 2, 3, 1))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); keys `norm1`, `attn`, `norm2`, `mlp`, `gamma1`, `gamma2`."""

    def __init__(self, dim: int, attn: nn.Module, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        self.gamma1, self.gamma2 = gamma(dim, spec.layer_scale), gamma(dim, spec.layer_scale)
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio), drop=spec.drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = x + self.drop_path(scaled(self.attn(self.norm1(x), stage), self.gamma1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))


class Level(nn.Module):
    """The blocks of one level, the maker of its global queries (None for mixers with their own), the downsampler."""

    def __init__(self, blocks: list[Block], queries: GlobalQueries | None, downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.q_global_gen = queries
        self.downsample = downsample

    def begin(self, x: Tensor) -> object:
        """What the blocks share, from the entrance of the level, x: [B, H, W, dim]."""
        if self.q_global_gen is not None:
            return self.q_global_gen(x)
        return begin((block.attn for block in self.blocks), x)  # type: ignore[misc]


class GCViT(VisionBackbone):
    """The backbone, any image size.

    dim: channels of the first level, doubled at every next one. depths, heads, windows: one entry a level. drop_path:
    rate of the last block. spec: what blocks share. With `features_only` the levels have norms, as in the published
    dense-prediction class, whose windows are 24.
    """

    ignored: ClassVar[tuple[str, ...]] = ("relative_position_index",)
    tables: ClassVar[dict[str, TableLayout]] = {"relative_position_bias_table": "flat"}

    def __init__(
        self,
        dim: int = 64,
        depths: tuple[int, ...] = (3, 4, 19, 5),
        heads: tuple[int, ...] = (2, 4, 8, 16),
        windows: tuple[int, ...] = (7, 7, 14, 7),
        drop_path: float = 0.2,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        count = len(depths)
        heads, windows = (per_stage(n, v, count, "GCViT") for n, v in (("heads", heads), ("windows", windows)))
        pools = per_stage("pools", _pools(windows) if spec.pools is None else spec.pools, count, "GCViT")
        self.pyramid(doubled(dim, count))
        self.patch_embed = Stem(in_chans, dim)
        self.pos_drop = nn.Dropout(spec.drop)
        self.levels = nn.ModuleList()
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            width = self.channels[i]
            attns = [_attention(width, heads[i], windows[i], spec, j) for j in range(len(rates))]
            blocks = [Block(width, attn, spec, rate) for attn, rate in zip(attns, rates, strict=True)]
            queries = None if spec.mixer is not None else GlobalQueries(width, heads[i], windows[i], pools[i])
            self.levels.append(Level(blocks, queries, Downsample(width, 2 * width) if i < count - 1 else None))
        self.add_end()
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, channels last."""
        x, maps = self.pos_drop(self.patch_embed(image)), []
        for level in self.levels:
            assert isinstance(level, Level)
            stage = level.begin(x)
            for block in level.blocks:
                x = self.run(block, x, stage)
            maps.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the normalised tokens."""
        return self.norm(last).mean((1, 2))

    @classmethod
    def convert(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's names to the authors'; its gates are 1 x 1 convolutions."""
        return _from_timm(state) if "stem.conv1.weight" in state else dict(state)

    @classmethod
    def to_timm(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names to timm's, the inverse of `convert`; gates become 1 x 1 convolutions."""
        gates = {name: value[:, :, None, None] for name, value in state.items() if ".conv.2.fc." in name}
        return renamed({**state, **gates}, _TO_TIMM)


def _attention(dim: int, heads: int, window: int, spec: BlockSpec, index: int) -> nn.Module:
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    if index % 2:
        return GlobalQueryAttention(dim, heads, window, spec.relative_bias, spec.attention)
    return WindowAttention(dim, heads, window, relative_bias=spec.relative_bias, spec=spec.attention)


def _pools(windows: tuple[int, ...]) -> tuple[int, ...]:
    """Halvings until a map has the size of the last level's, none where the window asks for the map as it is."""
    last = len(windows) - 1
    return tuple(0 if i < last and i >= last - 1 and w == 2 * windows[-1] else last - i for i, w in enumerate(windows))


_TIMM = (
    (r"^stem\.conv1\.", "patch_embed.proj."),
    (r"^stem\.down\.", "patch_embed.conv_down."),
    (r"^stages\.3\.norm\.", "norm."),
    (r"^stages\.", "levels."),
    (r"\.global_block\.blocks\.conv(\d+)\.", lambda m: f".q_global_gen.to_q_global.{int(m[1]) - 1}.conv_block."),
    (r"\.conv_block\.conv_dw\.", ".conv.0."),
    (r"\.conv_block\.se\.fc1\.", ".conv.2.fc.0."),
    (r"\.conv_block\.se\.fc2\.", ".conv.2.fc.2."),
    (r"\.conv_block\.conv_pw\.", ".conv.3."),
    (r"\.ls([12])\.gamma$", r".gamma\1"),
    (r"\.attn\.rel_pos\.", ".attn."),
    (r"^head\.fc\.", "head."),
)


_TO_TIMM: Rules = (
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.", "stem.down."),
    (r"^levels\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^levels\.", "stages."),
    (r"\.q_global_gen\.to_q_global\.(\d+)\.conv\.", lambda m: f".global_block.blocks.conv{int(m[1]) + 1}."),
    (r"\.conv\.(?=0\.|2\.fc\.|3\.)", ".conv_block."),
    (r"\.(conv_block|conv\d+)\.0\.", r".\1.conv_dw."),
    (r"\.(conv_block|conv\d+)\.2\.fc\.0\.", r".\1.se.fc1."),
    (r"\.(conv_block|conv\d+)\.2\.fc\.2\.", r".\1.se.fc2."),
    (r"\.(conv_block|conv\d+)\.3\.", r".\1.conv_pw."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"\.attn\.relative_position_bias_table$", ".attn.rel_pos.relative_position_bias_table"),
    (r"^norm\.", "stages.3.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        for pattern, replacement in _TIMM:
            name = re.sub(pattern, replacement, name)
        downsample = re.match(r"levels\.(\d+)\.downsample\.(.*)", name)  # timm's lie at the entrance of the next level
        if downsample is not None:
            name = f"levels.{int(downsample[1]) - 1}.downsample.{downsample[2]}"
        out[name] = value.flatten(1) if ".conv.2.fc." in name else value
    return out


DENSE_WINDOWS = (24, 24, 24, 24)


def _keywords(
    dim: int,
    depths: tuple[int, ...],
    mlp_ratio: float,
    drop_path: float,
    layer_scale: float | None = None,
    side: int = 7,
) -> dict[str, object]:
    """Keywords of a published model; heads have 32 channels, windows are side, side, 2 side, side."""
    return {
        "dim": dim,
        "depths": depths,
        "heads": tuple(dim * 2**i // 32 for i in range(4)),
        "windows": (side, side, 2 * side, side),
        "drop_path": drop_path,
        "spec": BlockSpec(mlp_ratio=mlp_ratio, layer_scale=layer_scale),
    }


# fmt: off
_DEEP, _22K, _CODE = (3, 4, 19, 5), "ImageNet-21K", "multiply-adds of the released code; its table says "
VARIANTS = (
    Variant("gc_vit_xxtiny", "gc_vit", _keywords(64, (2, 2, 6, 2), 3, 0.2), 11_995_428, 2.12, 79.9),
    Variant("gc_vit_xtiny", "gc_vit", _keywords(64, (3, 4, 6, 5), 3, 0.2), 19_981_294, 2.91, 82.0, note=_CODE + "2.6"),
    Variant("gc_vit_tiny", "gc_vit", _keywords(64, _DEEP, 3, 0.2), 28_221_974, 4.76, 83.5),
    Variant("gc_vit_tiny2", "gc_vit", _keywords(64, (3, 4, 29, 5), 3, 0.25), 34_535_654, 6.18, 83.7,
            note=_CODE + "5.5"),
    Variant("gc_vit_small", "gc_vit", _keywords(96, _DEEP, 2, 0.3, 1e-5), 51_092_173, 8.53, 84.3),
    Variant("gc_vit_small2", "gc_vit", _keywords(96, (3, 4, 23, 5), 3, 0.35, 1e-5), 68_615_197, 11.54, 84.8,
            note=_CODE + "10.7"),
    Variant("gc_vit_base", "gc_vit", _keywords(128, _DEEP, 2, 0.5, 1e-5), 90_320_836, 14.82, 85.0),
    Variant("gc_vit_large", "gc_vit", _keywords(192, _DEEP, 2, 0.5, 1e-5), 202_075_570, 32.56, 85.7),
    Variant("gc_vit_large_224_21k", "gc_vit", _keywords(192, _DEEP, 2, 0.5, 1e-5), 202_075_570, 32.56, 86.6,
            pretrained_on=_22K),
    Variant("gc_vit_large_384_21k", "gc_vit", _keywords(192, _DEEP, 2, 0.1, 1e-5, 12), 202_860_610, 103.9, 87.4,
            size=384, pretrained_on=_22K, note=_CODE + "120.4"),
    Variant("gc_vit_large_512_21k", "gc_vit", _keywords(192, _DEEP, 2, 0.1, 1e-5, 16), 203_795_362, 202.1, 87.6,
            size=512, pretrained_on=_22K, note=_CODE + "245.0"),
)
# fmt: on
register_model(GCViT, VARIANTS)
