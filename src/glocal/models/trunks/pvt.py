"""PVT (arXiv 2102.12122) under the authors' key names; other systems put their attention into it."""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks._blocks import Block, through
from glocal.models.trunks.vit import resized
from glocal.models.vision.base import VisionBackbone, laid_out, per_stage
from glocal.nn.blocks import LayerNorm, PatchEmbed, drop_rates, init_linears, to_nchw
from glocal.nn.spatial_reduction import SpatialReductionAttention


class PVTShape(VisionBackbone):
    """Stages that each have a patch embedding and learned positions; `attention` says what is in the blocks.

    Positions are stored for one size; others interpolate them bilinearly, as PVT does.
    """

    @abstractmethod
    def attention(self, stage: int, index: int) -> nn.Module:
        """The attention of block `index` of a stage."""

    def build(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        img_size: int,
        ratios: tuple[float, ...],
        drop_path: float,
        token: bool = False,
    ) -> None:
        """Add embeddings, positions, blocks and head. ratios: hidden over outer channels, one a stage. token: a class
        token in the last stage.
        """
        self.pyramid(dims)
        self.sides = tuple(img_size // stride for stride in self.strides)
        self.cls_token: nn.Parameter | None = None
        if token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        widths = pairwise((self.in_chans, *dims))
        for i, (rates, (before, dim)) in enumerate(zip(drop_rates(drop_path, depths), widths, strict=True)):
            extra = int(token and i == len(dims) - 1)
            place = nn.Parameter(torch.zeros(1, self.sides[i] ** 2 + extra, dim))
            nn.init.trunc_normal_(place, std=0.02)
            blocks = [Block(dim, self.attention(i, j), ratios[i], r, 1e-6) for j, r in enumerate(rates)]
            self.add_module(f"patch_embed{i + 1}", PatchEmbed(before, dim, patch=2 if i else 4))
            self.register_parameter(f"pos_embed{i + 1}", place)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
        self.head = nn.Identity() if self.features_only else self.make_head(dims[-1])
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all stages, channels last."""
        return self.walk(image)[0]

    def walk(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps of all stages, channels last, and what the last blocks gave: tokens [B, 1 + h * w, C], the class token
        first, where there is one.
        """
        x, maps, last = image, [], image
        for i, side in enumerate(self.sides, 1):
            x = self.get_submodule(f"patch_embed{i}")(x)
            size, table = (x.shape[1], x.shape[2]), self.get_parameter(f"pos_embed{i}")
            blocks, lead = self.get_submodule(f"block{i}"), table.shape[1] - side**2
            place = resized(table[:, lead:], side, size, "bilinear")
            if lead and self.cls_token is not None:
                x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), 1)
                last = through(self, x + torch.cat((table[:, :1], place), 1), blocks)
                maps.append(last[:, 1:].unflatten(1, size))
            else:
                last = through(self, x + place.unflatten(1, size), blocks)
                maps.append(last)
            x = to_nchw(maps[-1])
        return maps, last

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the tokens."""
        return last.mean((1, 2))


class PVT(PVTShape):
    """Attention to maps that convolutions made smaller; the classifier reads a class token of the last stage.

    dims, depths, heads, ratios, reductions: one entry a stage; ratios are hidden over outer channels, reductions the
    sides of the cells that become keys (1 in the last stage). img_size: px a side that positions are stored for.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("cls_token",)
    behind: ClassVar[tuple[str, ...]] = ("norm.",)

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        heads: tuple[int, ...] = (1, 2, 5, 8),
        reductions: tuple[int, ...] = (8, 4, 2, 1),
        ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        img_size: int = 224,
        num_classes: int = 1000,
        *,
        drop_path: float = 0.1,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        named = {"depths": depths, "heads": heads, "reductions": reductions, "ratios": ratios}
        for name, values in named.items():
            per_stage(name, values, len(dims), "PVT")
        if reductions[-1] != 1:
            raise ValueError(f"PVT: reductions={reductions} must end with 1: the last stage has a class token.")
        self._shape = tuple(zip(dims, heads, reductions, strict=True))
        self.build(dims, depths, img_size, ratios, drop_path, token=True)
        if not features_only:
            self.norm = LayerNorm(dims[-1], eps=1e-6)

    def attention(self, stage: int, index: int) -> nn.Module:
        """Attention to a smaller map."""
        return SpatialReductionAttention(*self._shape[stage])

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """As in `VisionBackbone`; the classifier reads the class token."""
        if self.features_only:
            return self.features(image)
        self._check(image)
        return self.head(self.norm(self.walk(laid_out(image))[1][:, 0]))


register_model(
    PVT,
    (
        Variant("pvt_tiny", "", {}, None, 1.9, 75.1),
        Variant("pvt_small", "", {"depths": (3, 4, 6, 3)}, None, 3.8, 79.8),
        Variant("pvt_medium", "", {"depths": (3, 4, 18, 3), "drop_path": 0.3}, None, 6.7, 81.2),
        Variant("pvt_large", "", {"depths": (3, 8, 27, 3), "drop_path": 0.3}, None, 9.8, 81.7),
    ),
)
