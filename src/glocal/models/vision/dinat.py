"""NAT (arXiv 2204.07143), DiNAT and DiNAT_s (arXiv 2209.15001): backbones of neighbourhood attention.

Every token attends to its window x window neighbours; DiNAT does so on a dilated grid in every other block, so that a
few blocks see the whole map. NAT and DiNAT embed and merge by overlapping 3 x 3 convolutions, DiNAT_s has Swin's shape,
the isotropic forms are single-level with patches of 16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import TableLayout, VisionBackbone, doubled, per_stage
from glocal.nn.blocks import (
    DropPath,
    LayerNorm,
    Mlp,
    PatchEmbed,
    PatchMerge,
    StridedConvEmbed,
    StridedConvMerge,
    drop_rates,
    gamma,
    init_linears,
    scaled,
)
from glocal.nn.dinat import DilatedNeighborhoodAttention
from glocal.nn.mixer import begin, mixer

Dilations = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    window: side of the neighbourhood. mlp_ratio: hidden over outer channels. layer_scale: start of its factors, None
    for none. scale: of the logits, None is head size ** -0.5. mixer: another token mixer by name or "file.py:Class".
    """

    window: int = 7
    mlp_ratio: float = 3.0
    layer_scale: float | None = None
    scale: float | None = None
    drop: float = 0.0
    attn_drop: float = 0.0
    mixer: str | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); keys `norm1`, `attn`, `norm2`, `mlp`, `gamma1`, `gamma2`."""

    def __init__(self, dim: int, heads: int, spec: BlockSpec, index: int, dilation: int, drop_path: float) -> None:
        super().__init__()
        self.gamma1, self.gamma2 = gamma(dim, spec.layer_scale), gamma(dim, spec.layer_scale)
        self.norm1 = LayerNorm(dim)
        self.attn = self._attention(dim, heads, spec, index, dilation)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio), drop=spec.drop)
        self.drop_path = DropPath(drop_path)

    @staticmethod
    def _attention(dim: int, heads: int, spec: BlockSpec, index: int, dilation: int) -> nn.Module:
        if spec.mixer is not None:
            return mixer(spec.mixer, dim, heads, block=index)
        return DilatedNeighborhoodAttention(
            dim,
            heads,
            window=spec.window,
            dilation=dilation,
            scale=spec.scale,
            attn_drop=spec.attn_drop,
            proj_drop=spec.drop,
        )

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = x + self.drop_path(scaled(self.attn(self.norm1(x), stage), self.gamma1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))


class Level(nn.Module):
    """The blocks of one level, and the downsampler behind them (None after the last)."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class _Neighborhood(VisionBackbone):
    """What the three shapes share: levels of blocks, mean of normalised tokens, linear head."""

    undecayed: ClassVar[tuple[str, ...]] = ("rpb",)
    tables: ClassVar[dict[str, TableLayout]] = {"rpb": "heads_first"}
    parts: ClassVar[str] = "levels"  # name of the list of levels in the published keys

    def build(
        self,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        dilations: Dilations | None,
        drop_path: float,
        spec: BlockSpec,
        merge: type[StridedConvMerge] | type[PatchMerge],
    ) -> None:
        """Add the levels, the norms and the head."""
        name, last = type(self).__name__, len(depths) - 1
        per_stage("heads", heads, len(depths), name)
        if dilations is None:
            dilations = tuple((1,) * depth for depth in depths)
        _check_dilations(per_stage("dilations", dilations, len(depths), name), depths, name)
        levels: list[Level] = []
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            dim = self.channels[i]
            blocks = [Block(dim, heads[i], spec, j, dilations[i][j], rate) for j, rate in enumerate(rates)]
            levels.append(Level(blocks, merge(dim, 2 * dim) if i < last else None))
        self.add_module(self.parts, nn.ModuleList(levels))
        self.add_end()
        init_linears(self)

    def maps_of(self, x: Tensor) -> list[Tensor]:
        """x: [B, h, w, C] tokens -> the map of every level."""
        maps = []
        for level in getattr(self, self.parts):
            stage = begin((block.attn for block in level.blocks), x)
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
        """The names of transformers' former Nat and Dinat classes to the authors'."""
        return _from_transformers(state) if any(".attention.self.query." in name for name in state) else dict(state)


class NAT(_Neighborhood):
    """NAT, and DiNAT where `dilations` are given.

    dim: channels of the first level, doubled at every next one. depths, heads: one entry a level. dilations: one tuple
    a level with one entry a block; None is 1 everywhere. drop_path: rate of the last block. spec: what blocks share.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: tuple[int, ...] = (3, 4, 18, 5),
        heads: tuple[int, ...] = (2, 4, 8, 16),
        dilations: Dilations | None = None,
        drop_path: float = 0.2,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.pyramid(doubled(dim, len(depths)))
        self.patch_embed = StridedConvEmbed(in_chans, dim)
        self.pos_drop = nn.Dropout(spec.drop)
        self.build(depths, heads, dilations, drop_path, spec, StridedConvMerge)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, channels last."""
        return self.maps_of(self.pos_drop(self.patch_embed(image)))


class DiNATs(_Neighborhood):
    """DiNAT_s: dilated neighbourhood attention in the shape of Swin (arXiv 2103.14030). Arguments as in `NAT`."""

    parts: ClassVar[str] = "layers"

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        dilations: Dilations | None = None,
        drop_path: float = 0.2,
        spec: BlockSpec = BlockSpec(mlp_ratio=4.0),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.pyramid(doubled(dim, len(depths)))
        self.patch_embed = PatchEmbed(in_chans, dim)
        self.pos_drop = nn.Dropout(spec.drop)
        self.build(depths, heads, dilations, drop_path, spec, PatchMerge)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, channels last."""
        return self.maps_of(self.pos_drop(self.patch_embed(image)))


class IsotropicNAT(_Neighborhood):
    """One level of tokens of 16 x 16 px, without class token or absolute positions.

    dim, heads: of all blocks. dilations: one a block, None is 1 everywhere. full: every token sees the whole map
    through the same kind of relative table (ViT-rpb); it runs at the one size its table is for, 16 window px a side.
    """

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        heads: int = 12,
        dilations: tuple[int, ...] | None = None,
        drop_path: float = 0.1,
        spec: BlockSpec = BlockSpec(mlp_ratio=4.0),
        full: bool = False,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.channels, self.strides, self.full, self.window = (dim,), (16,), full, spec.window
        self.patch_embed = PatchEmbed(in_chans, dim, patch=16)
        per_level = None if dilations is None else (dilations,)
        self.build((depth,), (heads,), per_level, drop_path, spec, PatchMerge)

    def maps(self, image: Tensor) -> list[Tensor]:
        """The one map, channels last. Raises ValueError for a size that a full table does not fit."""
        x = self.patch_embed(image)
        if self.full and tuple(x.shape[1:3]) != (self.window, self.window):
            side = 16 * self.window
            raise ValueError(
                f"IsotropicNAT: image of {image.shape[2]} x {image.shape[3]} px gives {x.shape[1]} x {x.shape[2]} "
                f"tokens, but full attention has a table for {self.window} x {self.window}; give {side} x {side} px, "
                f"or build with spec.window for your size."
            )
        return self.maps_of(x)


_TRANSFORMERS = (
    (r"^(nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, value in state.items():
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    out = {}
    for name, value in named.items():
        if name.endswith(".layer_scale_parameters"):  # [2, dim]: both factors of a block
            block = name.removesuffix("layer_scale_parameters")
            out[f"{block}gamma1"], out[f"{block}gamma2"] = value[0], value[1]
        elif ".attn.query." in name:
            parts = [named[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            out[name.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif ".attn.key." not in name and ".attn.value." not in name:
            out[name] = value
    return out


def gradual_dilations(depths: tuple[int, ...], odd: Dilations) -> Dilations:
    """1 in the even blocks of a level, the entries of `odd` in turn in the odd ones: for large maps.

    The authors' dense-prediction models use `odd` = DENSE_DILATIONS[task].
    """
    return tuple(
        tuple(1 if j % 2 == 0 else row[j // 2 % len(row)] for j in range(n)) for n, row in zip(depths, odd, strict=True)
    )


DENSE_DILATIONS: dict[str, Dilations] = {
    "detection": ((28,), (7, 14), (3, 5, 7), (3,)),
    "segmentation": ((16,), (4, 8), (2, 3, 4), (2,)),
    "segmentation_large": ((20,), (5, 10), (2, 3, 4, 5, 2, 3, 4, 5, 5), (2,)),  # of DiNAT-L
    "mask2former_large": ((14,), (4, 7), (2, 3), (1,)),  # of DiNAT-L with windows of 11
}


def largest_dilations(depths: tuple[int, ...], largest: tuple[int, ...]) -> Dilations:
    """1 in the even blocks of a level, the level's `largest` in the odd ones (arXiv 2209.15001, section 3.3)."""
    return tuple(tuple(1 if j % 2 == 0 else d for j in range(n)) for n, d in zip(depths, largest, strict=True))


def _check_dilations(dilations: Dilations, depths: tuple[int, ...], model: str) -> None:
    for i, (row, depth) in enumerate(zip(dilations, depths, strict=True)):
        if len(row) != depth:
            raise ValueError(
                f"{model}: dilations[{i}]={tuple(row)} has {len(row)} entries; level {i} has {depth} blocks."
            )


_DEPTHS = {"mini": (3, 4, 6, 5), "deep": (3, 4, 18, 5), "s_tiny": (2, 2, 6, 2), "s_deep": (2, 2, 18, 2)}
_AT_224, _AT_384 = (8, 4, 2, 1), (13, 6, 3, 1)  # floor(map / 7) at maps of 1/4, 1/8, 1/16, 1/32


def _keywords(
    dim: int, depths: str, largest: tuple[int, ...] | None, drop_path: float, mlp_ratio: float, **spec: float
) -> dict[str, object]:
    """Keywords of a published NAT, DiNAT or DiNAT_s; heads have 32 channels."""
    return {
        "dim": dim,
        "depths": _DEPTHS[depths],
        "heads": tuple(dim * 2**i // 32 for i in range(4)),
        "dilations": None if largest is None else largest_dilations(_DEPTHS[depths], largest),
        "drop_path": drop_path,
        "spec": BlockSpec(mlp_ratio=mlp_ratio, **spec),  # type: ignore[arg-type]
    }


def _isotropic(dim: int, largest: int, window: int = 7, full: bool = False) -> dict[str, object]:
    """Keywords of a published isotropic model."""
    dilations = tuple(1 if j % 2 == 0 else largest for j in range(12))
    spec = BlockSpec(window=window, mlp_ratio=4.0)
    return {"dim": dim, "heads": dim // 32, "dilations": dilations, "spec": spec, "full": full}


# fmt: off
_22K = "ImageNet-22K"
_SCALE = {"layer_scale": 1e-5}
NATS = (
    Variant("nat_mini", "dinat", _keywords(64, "mini", None, 0.2, 3), 19_984_174, 2.7, 81.8),
    Variant("nat_tiny", "dinat", _keywords(64, "deep", None, 0.2, 3), 27_901_582, 4.3, 83.2),
    Variant("nat_small", "dinat", _keywords(96, "deep", None, 0.3, 2, **_SCALE), 50_743_297, 7.8, 83.7),
    Variant("nat_base", "dinat", _keywords(128, "deep", None, 0.5, 2, **_SCALE), 89_769_652, 13.7, 84.3),
    Variant("dinat_mini", "dinat", _keywords(64, "mini", _AT_224, 0.2, 3), 19_984_174, 2.7, 81.8),
    Variant("dinat_tiny", "dinat", _keywords(64, "deep", _AT_224, 0.2, 3), 27_901_582, 4.3, 82.7),
    Variant("dinat_small", "dinat", _keywords(96, "deep", _AT_224, 0.3, 2), 50_719_681, 7.8, 83.8),
    Variant("dinat_base", "dinat", _keywords(128, "deep", _AT_224, 0.5, 2, **_SCALE), 89_769_652, 13.7, 84.4),
    Variant("dinat_large", "dinat", _keywords(192, "deep", _AT_224, 0.35, 2), 200_943_514, 30.6, 86.6,
            pretrained_on=_22K),
    Variant("dinat_large_384", "dinat", _keywords(192, "deep", _AT_384, 0.35, 2), 200_943_514, 89.7, 87.4, size=384,
            pretrained_on=_22K),
    Variant("dinat_large_384_11x11", "dinat", _keywords(192, "deep", _AT_224, 0.35, 2, window=11), 201_144_250, 92.4,
            87.5, size=384, pretrained_on=_22K, note="starts from 7 x 7 tables, resized bicubically per head"),
    Variant("dinat_large_21k", "dinat", _keywords(192, "deep", _AT_224, 0.2, 2), classes=21841),
    Variant("dinat_large_21k_11x11", "dinat", _keywords(192, "deep", _AT_224, 0.2, 2, window=11), size=384,
            classes=21841),
)
SWIN_SHAPED = (
    Variant("dinat_s_tiny", "dinat", _keywords(96, "s_tiny", _AT_224, 0.2, 4), 28_288_354, top1=81.8),
    Variant("dinat_s_small", "dinat", _keywords(96, "s_deep", _AT_224, 0.3, 4), 49_606_258, top1=83.5),
    Variant("dinat_s_base", "dinat", _keywords(128, "s_deep", _AT_224, 0.5, 4), 87_768_224, top1=83.8),
    Variant("dinat_s_large", "dinat", _keywords(192, "s_deep", _AT_224, 0.35, 4), 196_532_476, top1=86.5,
            pretrained_on=_22K),
    Variant("dinat_s_large_384", "dinat", _keywords(192, "s_deep", _AT_384, 0.35, 4), 196_532_476, top1=87.4, size=384,
            pretrained_on=_22K),
    Variant("dinat_s_large_21k", "dinat", _keywords(192, "s_deep", _AT_224, 0.2, 4), classes=21841),
)
ISOTROPIC = (
    Variant("nat_isotropic_small", "dinat", _isotropic(384, 1), 21_999_736, top1=80.0),
    Variant("nat_isotropic_base", "dinat", _isotropic(768, 1), 86_465_800, top1=81.6),
    Variant("dinat_isotropic_small", "dinat", _isotropic(384, 2), 21_999_736, top1=80.8),
    Variant("dinat_isotropic_base", "dinat", _isotropic(768, 2), 86_465_800, top1=82.1),
    Variant("vit_rpb_small", "dinat", _isotropic(384, 1, window=14, full=True), 22_080_376, top1=81.2),
    Variant("vit_rpb_base", "dinat", _isotropic(768, 1, window=14, full=True), top1=82.5),
)
# fmt: on
register_model(NAT, NATS)
register_model(DiNATs, SWIN_SHAPED)
register_model(IsotropicNAT, ISOTROPIC)
