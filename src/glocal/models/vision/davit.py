"""DaViT (arXiv 2204.03645): window attention over tokens alternates with attention over groups of channels.

Linear in the pixels, any size, no position tables: a depthwise convolution before each half of a block tells tokens
where they lie. The vision towers of Florence-2 (arXiv 2311.06242) have overlapping mergings, windows of 12 and the
second form of channel attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import VisionBackbone, renamed
from glocal.nn.blocks import (
    ConvPosition,
    DropPath,
    LayerNorm,
    Mlp,
    NormConvMerge,
    PatchEmbed,
    drop_rates,
    init_linears,
)
from glocal.nn.channel_attention import ChannelAttention, ChannelForm
from glocal.nn.mixer import begin, mixer
from glocal.nn.window_attention import WindowAttention, WindowSpec

AttentionType = Literal["spatial", "channel"]


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    window: side of the windows. mlp_ratio: hidden over outer channels. ffn: False leaves the feed-forward part out.
    cpe_act: a GELU on the position convolutions. channel: form of the channel attention. types: the attentions of one
    round, in order. mixer: another token mixer by name or "file.py:Class" in place of all of them.
    """

    window: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    ffn: bool = True
    cpe_act: bool = False
    channel: ChannelForm = "v1"
    types: tuple[AttentionType, ...] = ("spatial", "channel")
    mixer: str | None = None

    def __post_init__(self) -> None:
        strange = [kind for kind in self.types if kind not in get_args(AttentionType)]
        if strange or not self.types:
            raise ValueError(f"BlockSpec: types={self.types}; each must be 'spatial' or 'channel', at least one.")


class Block(nn.Module):
    """s = cpe0(x); y = cpe1(s + attention(norm1(s))); y + mlp(norm2(y))."""

    def __init__(self, dim: int, attn: nn.Module, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConvPosition(dim, act=nn.GELU() if spec.cpe_act else None) for _ in range(2)])
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.mlp: Mlp | None = None
        if spec.ffn:
            self.norm2 = LayerNorm(dim)
            self.mlp = Mlp(dim, int(dim * spec.mlp_ratio))

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = self.cpe[0](x)
        x = self.cpe[1](x + self.drop_path(self.attn(self.norm1(x), stage)))
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm2(x)))


class DaViT(VisionBackbone):
    """The backbone.

    dims, depths, heads: one entry a level; a depth counts rounds of all `spec.types`, heads are also the groups of
    channel attention. overlapped: mergings by 3 x 3 convolutions instead of 2 x 2. drop_path: rate of the last block.
    """

    norms: nn.Module

    def __init__(
        self,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (1, 1, 3, 1),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        overlapped: bool = False,
        drop_path: float = 0.1,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.pyramid(dims, depths=depths, heads=heads)
        merges = [NormConvMerge(a, b, overlapped) for a, b in pairwise(dims)]
        self.patch_embeds = nn.ModuleList([PatchEmbed(in_chans, dims[0], patch=4, kernel=7), *merges])
        self.main_blocks = nn.ModuleList()
        for dim, n, rates in zip(
            dims, heads, drop_rates(drop_path, tuple(len(spec.types) * d for d in depths)), strict=True
        ):
            blocks = [Block(dim, _attention(dim, n, spec, j), spec, rate) for j, rate in enumerate(rates)]
            rounds = [nn.ModuleList(blocks[j : j + len(spec.types)]) for j in range(0, len(blocks), len(spec.types))]
            self.main_blocks.append(nn.ModuleList(rounds))
        self.add_end("norms")
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, channels last."""
        x, maps = image, []
        for embed, rounds in zip(self.patch_embeds, self.main_blocks, strict=True):
            x = embed(x)
            blocks = [block for each in rounds for block in each]  # type: ignore[union-attr]
            stage = begin((block.attn for block in blocks), x)
            for block in blocks:
                x = self.run(block, x, stage)
            maps.append(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the tokens, then the norm: in this order."""
        return self.norms(last.mean((1, 2)))

    @classmethod
    def convert(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's names, and those of Florence-2's vision tower, to the authors'."""
        rules = _TIMM if "stem.conv.weight" in state else _FLORENCE if "convs.0.proj.weight" in state else ()
        return renamed(state, rules)

    @classmethod
    def to_timm(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names to timm's, the inverse of `convert`."""
        return renamed(state, _TO_TIMM)


_TO_TIMM = (
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _attention(dim: int, heads: int, spec: BlockSpec, index: int) -> nn.Module:
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    if spec.types[index % len(spec.types)] == "channel":
        return ChannelAttention(dim, heads, spec.channel, spec.qkv_bias)
    return WindowAttention(dim, heads, spec.window, spec=WindowSpec(qkv_bias=spec.qkv_bias))


_TIMM = (
    (r"^stem\.conv\.", "patch_embeds.0.proj."),
    (r"^stem\.norm\.", "patch_embeds.0.norm."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"patch_embeds.\1.norm."),
    (r"^stages\.(\d+)\.blocks\.", r"main_blocks.\1."),
    (r"\.spatial_block\.", ".0."),
    (r"\.channel_block\.", ".1."),
    (r"\.cpe1\.", ".cpe.0."),
    (r"\.cpe2\.", ".cpe.1."),
    (r"^head\.norm\.", "norms."),
    (r"^head\.fc\.", "head."),
)
_FLORENCE = (
    (r"^convs\.", "patch_embeds."),
    (r"^blocks\.", "main_blocks."),
    (r"\.spatial_block\.", ".0."),
    (r"\.channel_block\.", ".1."),
    (r"\.conv1\.fn\.dw\.", ".cpe.0.proj."),
    (r"\.conv2\.fn\.dw\.", ".cpe.1.proj."),
    (r"\.(window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(window|channel)_attn\.fn\.", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".mlp."),
)


def _keywords(dim: int, depths: tuple[int, ...], overlapped: bool = False, **spec: object) -> dict[str, object]:
    """Keywords of a published model: dims double, heads and groups have 32 channels."""
    dims = tuple(dim * 2**i for i in range(4))
    heads = tuple(each // 32 for each in dims)
    return {"dims": dims, "depths": depths, "heads": heads, "overlapped": overlapped, "spec": BlockSpec(**spec)}  # type: ignore[arg-type]


# fmt: off
_UNRELEASED = "weights were never released; top-1 as recalled"
VARIANTS = (
    Variant("davit_tiny", "davit", _keywords(96, (1, 1, 3, 1)), 28_360_168, 4.54, 82.8),
    Variant("davit_small", "davit", _keywords(96, (1, 1, 9, 1)), 49_745_896, 8.80, 84.2),
    Variant("davit_base", "davit", _keywords(128, (1, 1, 9, 1)), 87_954_408, 15.51, 84.6),
    Variant("davit_large", "davit", _keywords(192, (1, 1, 9, 1), window=12), 196_811_752, 103.0, 87.5, size=384,
            pretrained_on="ImageNet-22K", note=_UNRELEASED),
    Variant("davit_huge", "davit", _keywords(256, (1, 1, 9, 1), True, window=12), 362_685_416, top1=90.2,
            pretrained_on="1.5B image-text pairs", note=_UNRELEASED),
    Variant("davit_giant", "davit", _keywords(384, (1, 1, 12, 3), True, window=12), 1_437_435_880, top1=90.4,
            pretrained_on="1.5B image-text pairs", note=_UNRELEASED),
    Variant("davit_huge_2x2", "davit", _keywords(256, (1, 1, 9, 1)), 348_922_856, 61.2,
            note="timm's davit_huge: mergings do not overlap, windows of 7"),
    Variant("davit_giant_2x2", "davit", _keywords(384, (1, 1, 12, 3)), 1_406_470_120, 192.8,
            note="timm's davit_giant: mergings do not overlap, windows of 7"),
    Variant("davit_base_florence2", "davit", _keywords(128, (1, 1, 9, 1), True, window=12, channel="v2"), 90_370_048,
            190.0, size=768, classes=0, note="vision tower of Florence-2-base"),
    Variant("davit_huge_florence2", "davit", _keywords(256, (1, 1, 9, 1), True, window=12, channel="v2"), 360_636_416,
            744.0, size=768, classes=0, note="vision tower of Florence-2-large"),
)
# fmt: on
register_model(DaViT, VARIANTS)
