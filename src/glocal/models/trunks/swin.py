"""Swin (arXiv 2103.14030) under the authors' key names, any image size; other systems put their attention into it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks._blocks import Block, Level, NormLastBlock, through
from glocal.models.vision.base import TableLayout, VisionBackbone, doubled, per_stage, renamed
from glocal.nn.blocks import PatchEmbed, PatchMerge, drop_rates, init_linears
from glocal.nn.window_attention import WindowAttention


class SwinShape(VisionBackbone):
    """Levels of blocks behind patches of 4 x 4, merged by 2 x 2; `attention` says what is in the blocks."""

    ignored: ClassVar[tuple[str, ...]] = ("relative_position_index", "attn_mask")
    tables: ClassVar[dict[str, TableLayout]] = {"relative_position_bias_table": "flat"}
    undecayed: ClassVar[tuple[str, ...]] = ("relative_position_bias_table",)
    norm_last: ClassVar[bool] = False  # norms behind attention, MLP and merging, as in Swin V2

    @abstractmethod
    def attention(self, level: int, index: int) -> nn.Module:
        """The attention of block `index` of a level."""

    def build(self, dim: int, depths: tuple[int, ...], ratios: tuple[float, ...], drop_path: float) -> None:
        """Add embedding, levels, norms and head. ratios: hidden over outer channels, one a level."""
        self.pyramid(doubled(dim, len(depths)))
        self.patch_embed = PatchEmbed(self.in_chans, dim)
        self.layers = nn.ModuleList()
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            width = self.channels[i]
            kind = NormLastBlock if self.norm_last else Block
            blocks = [kind(width, self.attention(i, j), ratios[i], rate) for j, rate in enumerate(rates)]
            merge = PatchMerge(width, 2 * width, self.norm_last) if i + 1 < len(depths) else None
            self.layers.append(Level(blocks, merge))
        self.add_end()
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all stages, channels last."""
        x, maps = self.patch_embed(image), []
        for level in self.layers:
            assert isinstance(level, Level)
            maps.append(through(self, x, level.blocks))
            x = maps[-1] if level.downsample is None else level.downsample(maps[-1])
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the normalised tokens."""
        return self.norm(last).mean((1, 2))


class Swin(SwinShape):
    """Windows with a relative bias, rolled in every other block.

    dim: channels of the first level, doubled at every next one. depths, heads: one entry a level. img_size: px a side;
    a level whose map is not larger than its window has one window of the map, not rolled, as published.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        img_size: int = 224,
        drop_path: float = 0.2,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self._heads = per_stage("heads", heads, len(depths), "Swin")
        self._dim, self._window, self._size = dim, window, img_size
        self.build(dim, depths, (4.0,) * len(depths), drop_path)

    def attention(self, level: int, index: int) -> nn.Module:
        """Attention inside windows."""
        side = self._size // (4 * 2**level)
        reach = min(self._window, side)
        shift = reach // 2 if index % 2 and reach < side else 0
        return WindowAttention(self._dim * 2**level, self._heads[level], reach, shift, relative_bias=True)

    @classmethod
    def convert(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's names to the authors'; its mergings lie at the entrance of the next level."""
        if "head.fc.weight" not in state:
            return dict(state)
        rules = (
            (r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
            (r"^head\.fc\.", "head."),
        )
        return renamed(state, rules)


_DEEP = {"depths": (2, 2, 18, 2), "drop_path": 0.3}
_BASE = {**_DEEP, "dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5}
register_model(
    Swin,
    (
        Variant("swin_tiny", "", {}, 28_288_354, 4.5, 81.3),
        Variant("swin_small", "", _DEEP, 49_606_258, 8.7, 83.0),
        Variant("swin_base", "", _BASE, 87_768_224, 15.4, 83.5),
        Variant("swin_base_384", "", {**_BASE, "window": 12, "img_size": 384}, 87_903_584, 47.1, 84.5, size=384),
    ),
)
