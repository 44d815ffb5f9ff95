"""InLine attention in the shapes of DeiT, PVT, Swin and CSWin (arXiv 2412.06590).

The paper replaces softmax attention by InLine attention in all blocks of DeiT and PVT, and in the early stages of Swin
and CSWin; the other blocks there stay windows with relative bias and cross-shaped stripes. State keys are the authors'.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks._blocks import Block, through
from glocal.models.trunks.swin import SwinShape
from glocal.models.trunks.vit import ViTShape, resized
from glocal.models.vision.base import VisionBackbone, per_stage
from glocal.nn.blocks import (
    DropPath,
    LayerNorm,
    Mlp,
    PatchEmbed,
    conv,
    drop_rates,
    init_linears,
    pad_multiple,
    to_nchw,
    to_nhwc,
)
from glocal.nn.inline import InLineAttention, InLineBranch, InLineSpec
from glocal.nn.mixer import mixer
from glocal.nn.stripe_attention import StripeBranch
from glocal.nn.window_attention import WindowAttention


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    mlp_ratio: hidden over outer channels, one value or one a stage. attention: settings of InLine attention. mixer:
    another token mixer by name or "file.py:Class" in every block (not in the shapes of DeiT and CSWin).
    """

    mlp_ratio: float | tuple[float, ...] = 4.0
    attention: InLineSpec = field(default_factory=InLineSpec)
    mixer: str | None = None

    def ratios(self, stages: int, model: str) -> tuple[float, ...]:
        """One ratio a stage."""
        ratios = self.mlp_ratio if isinstance(self.mlp_ratio, tuple) else (self.mlp_ratio,) * stages
        return per_stage("mlp_ratio", ratios, stages, model)


PVT_BLOCKS = BlockSpec((8.0, 8.0, 4.0, 4.0), InLineSpec(split_kv=True))


class TokenInLine(InLineAttention):
    """InLine attention over a class token and a map in one row of tokens."""

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, 1 + h * w, dim] -> the same shape; stage: (h, w)."""
        assert isinstance(stage, tuple)
        return self.proj(self.tokens(x, stage, lead=1))


class InLineDeiT(ViTShape):
    """DeiT with InLine attention: one level of `patch` px tokens, a class token, learned positions.

    img_size: px a side the position table is made for; other sizes interpolate it (bicubic, a rule of ours).
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        heads: int = 6,
        img_size: int = 224,
        patch: int = 16,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        drop_path: float = 0.1,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self._shape, self._spec = (dim, heads), spec
        self.build(dim, depth, (patch, img_size // patch), spec.ratios(1, "InLineDeiT")[0], drop_path)

    def attention(self, index: int) -> nn.Module:
        """InLine attention."""
        return TokenInLine(*self._shape, spec=self._spec.attention)


class InLinePVT(VisionBackbone):
    """PVT with InLine attention: four stages, each with a patch embedding and learned positions.

    dims, depths, heads: one entry a stage. img_size: px a side the position tables are made for; other sizes
    interpolate them (bilinear, as PVT does).
    """

    undecayed = ("pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4")

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        heads: tuple[int, ...] = (2, 4, 10, 16),
        img_size: int = 224,
        drop_path: float = 0.1,
        spec: BlockSpec = PVT_BLOCKS,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        per_stage("depths", depths, len(dims), "InLinePVT")
        per_stage("heads", heads, len(dims), "InLinePVT")
        ratios = spec.ratios(len(dims), "InLinePVT")
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(len(dims)))
        self.sides = tuple(img_size // stride for stride in self.strides)
        before = (in_chans, *dims)
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            embed = PatchEmbed(before[i], dims[i], patch=4 if i == 0 else 2)
            place = nn.Parameter(torch.zeros(1, self.sides[i] ** 2, dims[i]))
            nn.init.trunc_normal_(place, std=0.02)
            attns = (_attention(spec, dims[i], heads[i], j) for j in range(depths[i]))
            blocks = [Block(dims[i], attn, ratios[i], r, 1e-6) for attn, r in zip(attns, rates, strict=True)]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.register_parameter(f"pos_embed{i + 1}", place)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
        self.head = nn.Identity() if features_only else self.make_head(dims[-1])
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all stages, channels last."""
        x, maps = image, []
        for i, side in enumerate(self.sides, 1):
            x = self.get_submodule(f"patch_embed{i}")(x)
            place = resized(self.get_parameter(f"pos_embed{i}"), side, (x.shape[1], x.shape[2]), "bilinear")
            maps.append(through(self, x + place.unflatten(1, x.shape[1:3]), self.get_submodule(f"block{i}")))
            x = to_nchw(maps[-1])
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the tokens; there is no last norm."""
        return last.mean((1, 2))


class InLineSwin(SwinShape):
    """Swin with InLine attention in its first blocks.

    inline: how many of the blocks of each stage have it. window: of InLine blocks (56: the whole map at 224 px); the
    others have windows of max(7, window // 8). img_size: px a side; a stage whose map is not larger than its window
    has one window of the map, not rolled, as published. Other sizes run: InLine blocks take maps up to `window` whole.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        inline: tuple[int, ...] = (2, 2, 6, 0),
        window: int = 56,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        img_size: int = 224,
        drop_path: float = 0.2,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        for name, values in (("heads", heads), ("inline", inline)):
            per_stage(name, values, len(depths), "InLineSwin")
        self._dim, self._heads, self._inline, self._spec = dim, heads, inline, spec
        self._window, self._size = window, img_size
        self.build(dim, depths, spec.ratios(len(depths), "InLineSwin"), drop_path)

    def attention(self, level: int, index: int) -> nn.Module:
        """InLine attention in the first blocks of a level, windows with a relative bias in the others."""
        width, side = self._dim * 2**level, self._size // (4 * 2**level)
        linear = index < self._inline[level]
        reach = min(self._window if linear else max(7, self._window // 8), side)
        shift = reach // 2 if index % 2 and reach < side else 0
        if not linear and self._spec.mixer is None:
            return WindowAttention(width, self._heads[level], reach, shift, relative_bias=True)
        return _attention(self._spec, width, self._heads[level], index, self._window if linear else None, shift)


class CrossBlock(nn.Module):
    """A block of CSWin: one projection, one or two branches of attention side by side, feed-forward.

    branches: each takes its share of the channels. The mean that an InLine branch reads is that of x before the norm.
    """

    def __init__(self, dim: int, branches: list[nn.Module], mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm1 = LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.attns = nn.ModuleList(branches)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        parts = (*self.qkv(self.norm1(x)).chunk(3, -1), x.mean((1, 2)))
        shares = zip(*(t.chunk(len(self.attns), -1) for t in parts), strict=True)
        mixed = [branch(*share) for branch, share in zip(self.attns, shares, strict=True)]
        x = x + self.drop_path(self.proj(torch.cat(mixed, -1)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvMerge(nn.Module):
    """A 3 x 3 convolution of stride 2 with bias, then LayerNorm; keys `conv`, `norm`."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, 2, 1)
        self.norm = LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out]."""
        return self.norm(conv(self.conv, x))


class InLineCSWin(VisionBackbone):
    """CSWin with InLine attention in its first stages.

    inline: whether the blocks of a stage have it (over the whole map, in one branch). splits: tokens across the
    stripes of the other stages, None for attention over the whole map.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: tuple[int, ...] = (2, 4, 18, 1),
        heads: tuple[int, ...] = (2, 4, 8, 16),
        inline: tuple[bool, ...] = (True, True, False, False),
        splits: tuple[int | None, ...] = (1, 2, 7, None),
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        drop_path: float = 0.2,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        for name, values in (("heads", heads), ("inline", inline), ("splits", splits)):
            per_stage(name, values, len(depths), "InLineCSWin")
        ratios = spec.ratios(len(depths), "InLineCSWin")
        self.channels = tuple(dim * 2**i for i in range(len(depths)))
        self.strides = tuple(4 * 2**i for i in range(len(depths)))
        self.stage1_conv_embed = nn.ModuleDict({"0": nn.Conv2d(in_chans, dim, 7, 4, 2), "2": LayerNorm(dim)})
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            width = self.channels[i]
            blocks = []
            for rate in rates:
                branches = _branches(width, heads[i], inline[i], splits[i], spec.attention)
                blocks.append(CrossBlock(width, branches, ratios[i], rate))
            self.add_module(f"stage{i + 1}", nn.ModuleList(blocks))
            if i + 1 < len(depths):
                self.add_module(f"merge{i + 1}", ConvMerge(width, 2 * width))
        if features_only:
            self.add_level_norms()
        else:
            self.norm = LayerNorm(self.channels[-1])
            self.head = self.make_head(self.channels[-1])
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all stages, channels last."""
        x = pad_multiple(to_nhwc(image), 4)
        x = self.stage1_conv_embed["2"](conv(self.stage1_conv_embed["0"], x))
        maps: list[Tensor] = []
        for i in range(1, len(self.channels) + 1):
            if maps:
                x = self.get_submodule(f"merge{i - 1}")(x)
            x = through(self, x, self.get_submodule(f"stage{i}"))
            maps.append(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the normalised tokens."""
        return self.norm(last).mean((1, 2))


def _attention(
    spec: BlockSpec, dim: int, heads: int, index: int, window: int | None = None, shift: int = 0
) -> nn.Module:
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    return InLineAttention(dim, heads, window, shift if window is not None else 0, spec.attention)


def _branches(dim: int, heads: int, inline: bool, split: int | None, spec: InLineSpec) -> list[nn.Module]:
    if inline:
        return [InLineBranch(dim, heads, spec)]
    if split is None:
        return [StripeBranch(dim, heads, "whole")]
    return [StripeBranch(dim // 2, heads // 2, "columns", split), StripeBranch(dim // 2, heads // 2, "rows", split)]


# fmt: off
_BASE = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "inline": (2, 2, 2, 0), "drop_path": 0.5}
_CROSS = {"depths": (3, 6, 29, 2), "drop_path": 0.4}
_CROSS_BASE = {"dim": 96, "depths": (3, 6, 29, 2), "heads": (4, 8, 16, 32), "drop_path": 0.5}
register_model(InLineDeiT, (
    Variant("inline_deit_tiny", "inline", {}, 6_477_736, 1.1, 74.5),
    Variant("inline_deit_small", "inline", {"dim": 320, "heads": 10, "img_size": 288}, 16_734_760, 5.0, 80.2, size=288),
    Variant("inline_deit_base", "inline", {"dim": 384, "heads": 12, "img_size": 448}, 23_797_096, 17.2, 82.3, size=448),
))
register_model(InLinePVT, (
    Variant("inline_pvt_tiny", "inline", {}, 12_032_232, 2.0, 78.2),
    Variant("inline_pvt_small", "inline", {"depths": (3, 4, 6, 3)}, 21_556_136, 3.9, 82.0),
    Variant("inline_pvt_medium", "inline", {"depths": (3, 4, 18, 3), "drop_path": 0.3}, 37_618_856, 6.9, 83.2),
    Variant("inline_pvt_large", "inline", {"depths": (3, 8, 27, 3), "drop_path": 0.3}, 51_154_280, 10.2, 83.6),
))
register_model(InLineSwin, (
    Variant("inline_swin_tiny", "inline", {}, 29_223_544, 4.5, 82.4),
    Variant("inline_swin_small", "inline", {"depths": (2, 2, 18, 2), "inline": (2, 2, 0, 0), "drop_path": 0.3},
            49_793_296, 8.7, 83.6),
    Variant("inline_swin_base", "inline", _BASE, 88_350_120, 15.4, 84.1),
))
register_model(InLineCSWin, (
    Variant("inline_cswin_tiny", "inline", {}, 20_604_520, 4.3, 83.2),
    Variant("inline_cswin_small", "inline", _CROSS, 33_032_872, 6.8, 83.8),
    Variant("inline_cswin_base", "inline", _CROSS_BASE, 73_413_640, 14.9, 84.5),
    Variant("inline_cswin_base_384", "inline", {**_CROSS_BASE, "splits": (1, 2, 12, None)}, 73_413_640, 46.3, 85.7,
            size=384),
))
# fmt: on
