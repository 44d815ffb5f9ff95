"""Swin V2 (arXiv 2111.09883) under the authors' key names, any image size: cosines, log-spaced bias, norms last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks.swin import Swin, SwinShape
from glocal.models.vision.base import TableLayout, per_stage
from glocal.nn.cosine_windows import CosineWindowAttention


class SwinV2(SwinShape):
    """Windows of cosine attention, rolled in every other block.

    dim: channels of the first level, doubled at every next one. depths, heads: one entry a level. img_size: px a side;
    a level whose map is not larger than its window has one window of the map, not rolled, as published. trained: sides
    of the windows that the weights were trained with, one entry a level; None for those of the model.
    """

    ignored: ClassVar[tuple[str, ...]] = ("relative_position_index", "relative_coords_table", "attn_mask")
    tables: ClassVar[dict[str, TableLayout]] = {}
    undecayed: ClassVar[tuple[str, ...]] = ("cpb_mlp.0.weight", "cpb_mlp.2.weight", "logit_scale")
    norm_last: ClassVar[bool] = True

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 8,
        img_size: int = 256,
        drop_path: float = 0.2,
        num_classes: int = 1000,
        *,
        trained: tuple[int, ...] | None = None,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self._heads = per_stage("heads", heads, len(depths), "SwinV2")
        self._trained = None if trained is None else per_stage("trained", trained, len(depths), "SwinV2")
        self._dim, self._window, self._size = dim, window, img_size
        self.build(dim, depths, (4.0,) * len(depths), drop_path)
        for level in self.layers:
            for block in level.blocks:  # type: ignore[union-attr]
                for norm in (block.norm1, block.norm2):  # type: ignore[union-attr]
                    nn.init.zeros_(norm.weight)  # type: ignore[arg-type]  # blocks start as the identity

    def attention(self, level: int, index: int) -> nn.Module:
        """Cosine attention inside windows."""
        side = self._size // (4 * 2**level)
        reach = min(self._window, side)
        shift = reach // 2 if index % 2 and reach < side else 0
        trained = None if self._trained is None else self._trained[level]
        return CosineWindowAttention(self._dim * 2**level, self._heads[level], reach, shift, trained)

    @classmethod
    def convert(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's names to the authors'; its mergings lie at the entrance of the next level."""
        return Swin.convert(state)


def _variants() -> list[Variant]:
    shapes = {
        "tiny": {},
        "small": {"depths": (2, 2, 18, 2), "drop_path": 0.3},
        "base": {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "drop_path": 0.5},
        "large": {"dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48), "drop_path": 0.2},
    }
    out = []
    for name, figures in _FIGURES.items():
        shape, window, size = name.split("_")[1:]
        build = {
            **shapes[shape],
            "window": int(window.rpartition("to")[2].removeprefix("window")),
            "img_size": int(size),
        }
        if "to" in window:  # fine-tuned from windows of 12 at 192 px, the last level of which has one of 6
            build["trained"] = (12, 12, 12, 6)
        params, gflops, top1 = figures
        data = "ImageNet-22K" if "to" in window else ""
        out.append(Variant(name, "", build, params, gflops, top1, size=int(size), pretrained_on=data))
    return out


# fmt: off
_FIGURES = {  # parameters, multiply-adds in 1e9 and top-1 as published
    "swinv2_tiny_window8_256": (28_347_154, 5.9, 81.8),
    "swinv2_tiny_window16_256": (28_347_154, 6.6, 82.8),
    "swinv2_small_window8_256": (None, 11.5, 83.7),
    "swinv2_small_window16_256": (None, 12.6, 84.1),
    "swinv2_base_window8_256": (87_918_816, 20.3, 84.2),
    "swinv2_base_window16_256": (87_918_816, 21.8, 84.6),
    "swinv2_base_window12to16_256": (87_918_816, 21.8, 86.2),
    "swinv2_base_window12to24_384": (87_918_816, 54.7, 87.1),
    "swinv2_large_window12to16_256": (196_739_932, 47.5, 86.9),
    "swinv2_large_window12to24_384": (196_739_932, 115.4, 87.6),
}
# fmt: on
register_model(SwinV2, _variants())
