"""MaxViT (arXiv 2204.01697): each block is an inverted residual, attention in windows, attention in grids.

Keys and shapes are those of timm's conversion of the TensorFlow checkpoints (`maxvit_*_tf_*`). The published code runs
at sizes that windows and grids divide; here other maps are padded inside the attentions, the padding hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import TableLayout, VisionBackbone
from glocal.nn.blocks import (
    DropPath,
    LayerNorm,
    Mlp,
    drop_rates,
    to_nhwc,
)
from glocal.nn.blocks.mbconv import MBConv, SameConv2d, batch_norm, tanh_gelu
from glocal.nn.blocks.relative import Resize
from glocal.nn.maxvit import AxisAttention, Groups
from glocal.nn.mixer import begin, mixer


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    window, grid: sides of the two. head_size: channels of a head. trained: side that the relative tables are stored
    for, None is that of the attention (7 for TensorFlow's checkpoints at 384 and 512 px). shared_bias: one table for
    all heads. mixer: another token mixer by name or "file.py:Class" in place of both attentions.
    """

    window: int = 7
    grid: int = 7
    head_size: int = 32
    trained: int | None = None
    shared_bias: bool = False
    expansion: int = 4
    mlp_ratio: float = 4.0
    mixer: str | None = None


class Stem(nn.Module):
    """conv1 of stride 2, norm1, activation, conv2: nothing behind it."""

    def __init__(self, in_chans: int, dims: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = SameConv2d(in_chans, dims[0], 3, 2)
        self.norm1 = batch_norm(dims[0])
        self.act = tanh_gelu()
        self.conv2 = SameConv2d(dims[0], dims[1], 3)

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, in_chans, H, W] -> [B, ceil(H / 2), ceil(W / 2), dims[1]]."""
        return to_nhwc(self.conv2(self.act(self.norm1(self.conv1(image)))))


class Half(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, dim: int, attn: nn.Module, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio), tanh_gelu)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), stage))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Block(nn.Module):
    """conv, attn_block (windows), attn_grid, one after the other."""

    def __init__(self, conv: MBConv, attn_block: Half, attn_grid: Half) -> None:
        super().__init__()
        self.conv, self.attn_block, self.attn_grid = conv, attn_block, attn_grid


class Stage(nn.Module):
    """The blocks of one level; the first one halves the map."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class Head(nn.Module):
    """norm, a linear layer with tanh, the classifier `fc`."""

    def __init__(self, dim: int, fc: nn.Module) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.pre_logits = nn.Sequential()
        self.pre_logits.add_module("fc", nn.Linear(dim, dim))
        self.pre_logits.add_module("act", nn.Tanh())
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, dim] -> [B, classes]."""
        return self.fc(self.pre_logits(self.norm(x)))


class MaxViT(VisionBackbone):
    """The backbone, any image size.

    dims, depths: one entry a level. stem: widths of the two convolutions at half the size. drop_path: blocks are
    dropped at rates that rise from 0 in steps of drop_path / (number of blocks). spec: what blocks share.
    """

    classifier: ClassVar[str] = "head.fc"
    tables: ClassVar[dict[str, TableLayout]] = {"relative_position_bias_table": "heads_first"}
    table_resize: ClassVar[Resize] = "bilinear"
    undecayed: ClassVar[tuple[str, ...]] = ("relative_position_bias_table",)

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 5, 2),
        stem: tuple[int, int] = (64, 64),
        drop_path: float = 0.2,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.pyramid(dims, depths=depths)
        self.stem = Stem(in_chans, stem)
        total = sum(depths)
        width, stages = stem[1], []
        for dim, rates in zip(dims, drop_rates(drop_path * (total - 1) / total, depths), strict=True):
            blocks = []
            for j, rate in enumerate(rates):
                halves = [Half(dim, _attention(dim, 2 * j + i, spec), spec, rate) for i in range(2)]
                first = MBConv(width if j == 0 else dim, dim, 2 if j == 0 else 1, spec.expansion, rate)
                blocks.append(Block(first, *halves))
            width = dim
            stages.append(Stage(blocks))
        self.stages = nn.ModuleList(stages)
        if not features_only:
            self.head = Head(dims[-1], self.make_head(dims[-1]))
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @classmethod
    def to_timm(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's names, which are ours."""
        return dict(state)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, channels last."""
        x, maps = self.stem(image), []
        for level in self.stages:
            stage = None
            for j, block in enumerate(level.blocks):  # type: ignore[arg-type]
                x = self.run(block.conv, x)
                if j == 0:
                    stage = begin((h.attn for b in level.blocks for h in (b.attn_block, b.attn_grid)), x)  # type: ignore[union-attr]
                x = self.run(block.attn_grid, self.run(block.attn_block, x, stage), stage)
            maps.append(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the tokens; the head normalises it."""
        return last.mean((1, 2))


def _attention(dim: int, index: int, spec: BlockSpec) -> nn.Module:
    """Attention number `index` of a level: windows at even ones, grids at odd ones."""
    heads = dim // spec.head_size
    if dim % spec.head_size:
        near = max(round(dim / spec.head_size), 1) * spec.head_size
        raise ValueError(f"MaxViT: head_size={spec.head_size} must divide every width; {dim} is none, {near} is near.")
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    groups: Groups = "grid" if index % 2 else "window"
    return AxisAttention(dim, heads, groups, spec.grid if index % 2 else spec.window, spec.trained, spec.shared_bias)


def _variants() -> list[Variant]:
    shapes = {
        "tiny": ((64, 128, 256, 512), (2, 2, 5, 2), 64, 0.2),
        "small": ((96, 192, 384, 768), (2, 2, 5, 2), 64, 0.3),
        "base": ((96, 192, 384, 768), (2, 6, 14, 2), 64, 0.4),
        "large": ((128, 256, 512, 1024), (2, 6, 14, 2), 128, 0.6),
        "xlarge": ((192, 384, 768, 1536), (2, 6, 14, 2), 192, 0.6),
    }
    out = []
    for name, figures in _FIGURES.items():
        dims, depths, stem, drop_path = shapes[name]
        for size, (params, gflops, top1, note) in zip((224, 384, 512), figures, strict=True):
            side = size // 32
            build = {"dims": dims, "depths": depths, "stem": (stem, stem), "drop_path": drop_path}
            build["spec"] = BlockSpec(window=side, grid=side)
            data = "ImageNet-21K" if name == "xlarge" else ""
            figure = (params, gflops, top1, size)
            out.append(Variant(f"maxvit_{name}_tf_{size}", "maxvit", build, *figure, pretrained_on=data, note=note))
    return out


# fmt: off
_FIGURES = {  # parameters, multiply-adds in 1e9, top-1 and a note at 224, 384 and 512 px
    "tiny": ((30_916_528, 5.55, 83.62, ""), (30_977_008, 17.39, 85.24, ""), (31_049_584, 33.25, 85.72, "")),
    "small": ((68_927_956, 11.59, 84.45, ""), (69_018_676, 35.67, 85.74, ""), (69_127_540, 66.91, 86.19, "")),
    "base": ((119_467_708, 23.92, 84.95, ""), (119_653_468, 73.45, 86.34, "88.24 from ImageNet-21K"),
             (119_876_380, 137.4, 86.66, "88.38 from ImageNet-21K")),
    "large": ((211_785_560, 43.52, 85.17, ""), (212_033_240, 132.1, 86.40, "88.32 from ImageNet-21K"),
              (212_330_456, 243.9, 86.70, "88.46 from ImageNet-21K")),
    "xlarge": ((474_951_952, 97.25, None, "published with 21,843 classes"), (475_323_472, 292.1, 88.51, ""),
               (475_769_296, 532.9, 88.70, "")),
}
# fmt: on
register_model(MaxViT, _variants())
