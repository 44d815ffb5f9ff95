"""CSWin (arXiv 2107.00652) under the authors' key names, any image size; other systems put their attention into it.

Half of the heads attend inside stripes of columns, the other half inside stripes of rows; the last stage attends over
the whole map.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks._blocks import through
from glocal.models.vision.base import VisionBackbone, doubled, per_stage
from glocal.nn.blocks import DropPath, LayerNorm, Mlp, conv, drop_rates, init_linears, pad_multiple, to_nhwc
from glocal.nn.stripe_attention import StripeBranch


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


class CSWinShape(VisionBackbone):
    """Stages of blocks behind a 7 x 7 convolution of stride 4; `branches` says what is in the blocks."""

    @abstractmethod
    def branches(self, stage: int) -> list[nn.Module]:
        """The branches of attention of a block of a stage."""

    def build(self, dim: int, depths: tuple[int, ...], ratios: tuple[float, ...], drop_path: float) -> None:
        """Add embedding, stages, norm and head. ratios: hidden over outer channels, one a stage."""
        self.pyramid(doubled(dim, len(depths)))
        self.stage1_conv_embed = nn.ModuleDict({"0": nn.Conv2d(self.in_chans, dim, 7, 4, 2), "2": LayerNorm(dim)})
        for i, rates in enumerate(drop_rates(drop_path, depths)):
            width = self.channels[i]
            blocks = [CrossBlock(width, self.branches(i), ratios[i], rate) for rate in rates]
            self.add_module(f"stage{i + 1}", nn.ModuleList(blocks))
            if i + 1 < len(depths):
                self.add_module(f"merge{i + 1}", ConvMerge(width, 2 * width))
        self.add_end()
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


class CSWin(CSWinShape):
    """Stripes of columns and rows, then whole maps.

    dim: channels of the first stage, doubled at every next one. depths, heads: one entry a stage. splits: tokens across
    the stripes of a stage, None for attention over the whole map.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: tuple[int, ...] = (1, 2, 21, 1),
        heads: tuple[int, ...] = (2, 4, 8, 16),
        splits: tuple[int | None, ...] = (1, 2, 7, None),
        drop_path: float = 0.2,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        for name, values in (("heads", heads), ("splits", splits)):
            per_stage(name, values, len(depths), "CSWin")
        self._dim, self._heads, self._splits = dim, heads, splits
        self.build(dim, depths, (4.0,) * len(depths), drop_path)

    def branches(self, stage: int) -> list[nn.Module]:
        """Stripes both ways, or one branch over the whole map."""
        return stripes(self._dim * 2**stage, self._heads[stage], self._splits[stage])


def stripes(dim: int, heads: int, split: int | None) -> list[nn.Module]:
    """Stripes of columns and of rows, `split` tokens across, half of the heads each; None: one branch over the map."""
    if split is None:
        return [StripeBranch(dim, heads, "whole")]
    return [StripeBranch(dim // 2, heads // 2, "columns", split), StripeBranch(dim // 2, heads // 2, "rows", split)]


_DEEP = (2, 4, 32, 2)
_BASE = {"dim": 96, "depths": _DEEP, "heads": (4, 8, 16, 32), "drop_path": 0.5}
_LARGE = {"dim": 144, "depths": _DEEP, "heads": (6, 12, 24, 24), "drop_path": 0.5}
# fmt: off
_OFF = "its paper says 31.5 and 96.8 G multiply-adds, 5 % less than its code has"
register_model(
    CSWin,
    (
        Variant("cswin_tiny", "", {}, None, 4.3, 82.7),
        Variant("cswin_small", "", {"depths": _DEEP, "drop_path": 0.4}, None, 6.9, 83.6),
        Variant("cswin_base", "", _BASE, None, 15.0, 84.2),
        Variant("cswin_large", "", _LARGE, None, None, 86.5, pretrained_on="ImageNet-21K",
                note=_OFF),
        Variant("cswin_base_384", "", {**_BASE, "splits": (1, 2, 12, None)}, None, 47.0, 85.4, size=384),
        Variant("cswin_large_384", "", {**_LARGE, "splits": (1, 2, 12, None)}, None, None, 87.5, size=384,
                pretrained_on="ImageNet-21K", note=_OFF),
    ),
)
# fmt: on
