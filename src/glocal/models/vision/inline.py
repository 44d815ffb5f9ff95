"""InLine attention in the shapes of DeiT, PVT, Swin and CSWin (arXiv 2412.06590).

The paper replaces softmax attention by InLine attention in all blocks of DeiT and PVT, and in the early stages of Swin
and CSWin; the other blocks there stay windows with relative bias and cross-shaped stripes. State keys are the authors'.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks.cswin import CSWinShape, stripes
from glocal.models.trunks.pvt import PVTShape
from glocal.models.trunks.swin import SwinShape
from glocal.models.trunks.vit import ViTShape
from glocal.models.vision.base import per_stage
from glocal.nn.inline import InLineAttention, InLineBranch, InLineSpec
from glocal.nn.mixer import mixer
from glocal.nn.spatial_reduction import SpatialReductionAttention
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


class InLinePVT(PVTShape):
    """PVT with InLine attention: four stages, each with a patch embedding and learned positions.

    dims, depths, heads: one entry a stage. img_size: px a side the position tables are made for. inline: whether the
    blocks of a stage have InLine attention, None for all; the others have softmax attention to maps that convolutions
    made smaller, cells of `reductions` a side. The classifier reads the mean of the tokens; there is no last norm.
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
        inline: tuple[bool, ...] | None = None,
        reductions: tuple[int, ...] = (8, 4, 2, 1),
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        named: dict[str, tuple] = {"depths": depths, "heads": heads}
        if inline is not None:
            named |= {"inline": inline, "reductions": reductions}
        for name, values in named.items():
            per_stage(name, values, len(dims), "InLinePVT")
        self._shape, self._spec = tuple(zip(dims, heads, strict=True)), spec
        own = (True,) * len(dims) if inline is None else inline
        self._reduction = tuple(None if own[i] else reductions[i] for i in range(len(dims)))
        self.build(dims, depths, img_size, spec.ratios(len(dims), "InLinePVT"), drop_path)

    def attention(self, stage: int, index: int) -> nn.Module:
        """InLine attention over the whole map, or PVT's."""
        reduction = self._reduction[stage]
        if reduction is None or self._spec.mixer is not None:
            return _attention(self._spec, *self._shape[stage], index)
        return SpatialReductionAttention(*self._shape[stage], reduction)


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


class InLineCSWin(CSWinShape):
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
        self._dim, self._heads, self._inline, self._splits, self._spec = dim, heads, inline, splits, spec
        self.build(dim, depths, spec.ratios(len(depths), "InLineCSWin"), drop_path)

    def branches(self, stage: int) -> list[nn.Module]:
        """InLine attention over the map in the first stages, stripes in the others."""
        width = self._dim * 2**stage
        if self._inline[stage]:
            return [InLineBranch(width, self._heads[stage], self._spec.attention)]
        return stripes(width, self._heads[stage], self._splits[stage])


def _attention(
    spec: BlockSpec, dim: int, heads: int, index: int, window: int | None = None, shift: int = 0
) -> nn.Module:
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    return InLineAttention(dim, heads, window, shift if window is not None else 0, spec.attention)


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
