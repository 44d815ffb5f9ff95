"""DuoFormer (arXiv 2506.12982): a ResNet's four maps, attention over scales inside regions, attention among regions.

Made for histology tiles. The authors' entry point does not run; the parts are theirs, how they are put together is
read off their code. Any image size: images are padded with zeros at the bottom and the right to multiples of 32, and
the positions of regions are resized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from math import ceil
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks.resnet import ResNet, ResNetName
from glocal.models.vision._duoformer import BlockSpec, FirstFormer, MultiscaleFormer
from glocal.models.vision.base import VisionBackbone, laid_out
from glocal.nn.blocks import conv, to_nhwc
from glocal.nn.duoformer import region_tokens

ScaleToken = Literal["channel", "random"]
_RELEASED = BlockSpec()


class Projection(nn.Module):
    """A 1 x 1 convolution to `dim` for each map; keys `proj_heads{k}`, k the map's number from the finest."""

    def __init__(self, channels: tuple[int, ...], used: range, dim: int) -> None:
        super().__init__()
        self.used = used
        for k in used:
            layer = nn.Conv2d(channels[k], dim, 1)
            nn.init.kaiming_normal_(layer.weight)
            assert layer.bias is not None
            nn.init.normal_(layer.bias, std=1e-6)
            self.add_module(f"proj_heads{k}", layer)

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """maps: [B, H, W, channels[k]], finest first -> [B, H, W, dim], coarsest first, of the maps used."""
        return [conv(self.get_submodule(f"proj_heads{k}"), maps[k]) for k in self.used]


class Shrink(nn.Module):
    """`count` 3 x 3 convolutions of stride 2 with nothing between, then the maximum of 2 x 2; keys `conv1`, `conv2`."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        for i in range(count):
            self.add_module(f"conv{i + 1}", nn.Conv2d(dim, dim, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, dim, H, W] -> the sides divided by 2 ** (count + 1)."""
        for i in range(self.count):
            x = self.get_submodule(f"conv{i + 1}")(x)
        return F.max_pool2d(x, 2)


class NormedConv(nn.Module):
    """A 3 x 3 convolution, batch norm, ReLU; keys `conv`, `norm`."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, padding=1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, dim, H, W] -> [B, out, H, W]."""
        return F.relu(self.norm(self.conv(x)))


class Convs(nn.Module):
    """Four `NormedConv`s from `dim` channels to `out`; keys `nConvs.{i}`."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.nConvs = nn.Sequential(*(NormedConv(a, b) for a, b in pairwise((dim, out, out, out, out))))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, dim, H, W] -> [B, out, H, W]."""
        return self.nConvs(x)


class DuoFormer(VisionBackbone):
    """The backbone: logits of the class token; with `features_only` the trunk's four maps and that of the regions.

    trunk: a name of `glocal.models.trunks.resnet`. scales: how many of its maps are read, the coarsest first. token:
    the summary of a region starts from convolutions of all maps ("channel") or is one learned vector ("random").
    """

    classifier: ClassVar[str] = "vision_transformer.head"
    undecayed: ClassVar[tuple[str, ...]] = ("pos_embed", "pos_embed_for_scale", "cls_token", "channel_token")

    def __init__(
        self,
        trunk: ResNetName = "resnet50",
        scales: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        token: ScaleToken = "channel",
        spec: BlockSpec = _RELEASED,
        num_classes: int = 2,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        if not 2 <= scales <= 4:
            raise ValueError(f"DuoFormer: scales={scales}; legal: 2, 3, 4.")
        if depth < 1:
            raise ValueError(f"DuoFormer: depth={depth} must be at least 1.")
        if token not in get_args(ScaleToken):
            raise ValueError(f"DuoFormer: token={token!r}; legal: 'channel', 'random'.")
        resnet = ResNet(trunk, in_chans)
        widths = resnet.channels
        self.channels, self.strides = (*widths, dim), (*resnet.strides, 32)
        self.resnet_projector = nn.Sequential(*resnet.stem(), *resnet.layers())
        self.channel_token: nn.Parameter | None = None
        if token == "channel":
            self.chann_proj1, self.chann_proj2 = Shrink(widths[0], 2), Shrink(widths[1], 1)
            self.chann_proj_all = Convs(sum(widths), dim)
        else:
            self.channel_token = nn.Parameter(torch.zeros(1, 1, 1, dim))
            nn.init.trunc_normal_(self.channel_token, std=0.036)
        self.projection = Projection(widths, range(3, 3 - scales, -1), dim)
        head = None if features_only else self.make_head(dim)
        tokens = 1 + sum(4**k for k in range(scales))
        kind = FirstFormer if spec.generation == "first" else MultiscaleFormer
        self.vision_transformer = kind(dim, depth, heads, tokens, spec=spec, head=head)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of the trunk, and the summaries of regions before they attend to each other; channels last."""
        height, width = image.shape[2:]
        x = F.pad(image, (0, -width % 32, 0, -height % 32))
        trunk = []
        for i, layer in enumerate(self.resnet_projector):
            x = layer(x)  # never recomputed: its batch norms would count every batch twice
            if i >= 4:
                trunk.append(x)
        tokens = region_tokens(self.projection(tuple(to_nhwc(each) for each in trunk)))
        x = torch.cat((self._summaries(trunk, tokens), tokens), 2)  # [B, h * w, T, dim]
        regions = self.vision_transformer.regions(x, self.run).unflatten(1, trunk[-1].shape[2:])
        return [
            *(to_nhwc(m)[:, : ceil(height / s), : ceil(width / s)] for m, s in zip(trunk, self.strides, strict=False)),
            regions,
        ]

    def features(self, image: Tensor) -> list[Tensor]:
        """Levels as [B, C, H, W]: the trunk's four, and the regions after they attended to each other."""
        maps = super().features(image)
        regions = self.vision_transformer.among(to_nhwc(maps[-1]), self.run, slice(1, None))
        return [*maps[:-1], regions.transpose(1, 2).reshape(maps[-1].shape)]

    def pool(self, last: Tensor) -> Tensor:
        """last: [B, h, w, dim], the summaries of regions -> the class token after all blocks, [B, dim]."""
        return self.vision_transformer.among(last, self.run, slice(0, 1))[:, 0]

    def forward(self, image: Tensor) -> Any:
        """image: [B, in_chans, H, W] -> logits [B, num_classes] (the class token for 0 classes), or the features."""
        if self.features_only:
            return self.features(image)
        self._check(image)
        return self.vision_transformer.head(self.pool(self.maps(laid_out(image))[-1]))

    def _summaries(self, trunk: list[Tensor], tokens: Tensor) -> Tensor:
        """What the summary of each region starts from, [B, h * w, 1, dim]."""
        if self.channel_token is not None:
            return self.channel_token.expand(*tokens.shape[:2], 1, -1)
        down = (self.chann_proj1(trunk[0]), self.chann_proj2(trunk[1]), F.max_pool2d(trunk[2], 2), trunk[3])
        return to_nhwc(self.chann_proj_all(torch.cat(down, 1))).flatten(1, 2)[:, :, None]

    @classmethod
    def convert(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's names in the trunk, as in the authors' files with self-supervised trunks, to its positions."""
        out = {}
        for name, value in state.items():
            for ours, theirs in enumerate(("conv1", "bn1", None, None, "layer1", "layer2", "layer3", "layer4")):
                if theirs is not None:
                    name = re.sub(rf"^resnet_projector\.{theirs}\.", f"resnet_projector.{ours}.", name)
            out[name] = value
        return out


def _keywords(trunk: ResNetName, scales: int, token: ScaleToken = "channel") -> dict[str, object]:
    return {"trunk": trunk, "scales": scales, "token": token}


# fmt: off
_NO_TABLE = "no accuracy on a public benchmark is published"
VARIANTS = (
    Variant("duoformer_r50_2scales", "duoformer", _keywords("resnet50", 2), 185_335_106, classes=2, note=_NO_TABLE),
    Variant("duoformer_r50_3scales", "duoformer", _keywords("resnet50", 3), 185_741_378, classes=2, note=_NO_TABLE),
    Variant("duoformer_r50_4scales", "duoformer", _keywords("resnet50", 4), 185_987_906, classes=2, note=_NO_TABLE),
    Variant("duoformer_r50_2scales_random", "duoformer", _keywords("resnet50", 2, "random"), 139_319_362, classes=2),
    Variant("duoformer_r50_3scales_random", "duoformer", _keywords("resnet50", 3, "random"), 139_725_634, classes=2),
    Variant("duoformer_r50_4scales_random", "duoformer", _keywords("resnet50", 4, "random"), 139_972_162, classes=2),
    Variant("duoformer_r18_2scales", "duoformer", _keywords("resnet18", 2), 148_009_026, classes=2, note=_NO_TABLE),
    Variant("duoformer_r18_3scales", "duoformer", _keywords("resnet18", 3), 148_120_386, classes=2, note=_NO_TABLE),
    Variant("duoformer_r18_4scales", "duoformer", _keywords("resnet18", 4), 148_219_458, classes=2, note=_NO_TABLE),
)
# fmt: on
register_model(DuoFormer, VARIANTS)
