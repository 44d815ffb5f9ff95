"""BiFormer (arXiv 2303.08810): bi-level routing attention in three stages, dense attention in the last.

Two shapes: BiFormer with convolutional stem and position convolutions, and the one in the layout of Swin-T ("STL") that
the paper's ablation uses, with the released operator or the refactored one ("nchw").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import VisionBackbone, per_stage
from glocal.nn.biformer import ConvAttention, LepeAttention, apply
from glocal.nn.bilevel_routing import BiLevelRoutingAttention, GridRoutingAttention, RoutingSpec
from glocal.nn.blocks import (
    DepthwiseConv,
    DropPath,
    LayerNorm,
    conv,
    drop_rates,
    gamma,
    init_linears,
    pad_multiple,
    scaled,
    to_nhwc,
)
from glocal.nn.mixer import begin, mixer

Form = Literal["released", "nchw"]
Norm = Literal["layer", "batch"]
EPS = 1e-6


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    regions: a side of the map (a number, whatever its size). mlp_ratio: hidden over outer channels, one value or one a
    stage. head_dim: channels of a head. position: side of the convolution before each block, 0 for none. mlp_dwconv: a
    3 x 3 convolution in the feed-forward part. layer_scale: start of the learned factors, None for none. pre_norm:
    False normalises after each half instead. form: the operator. norm: kind of the norms outside the blocks in the
    layout of Swin-T. routing: settings of the bi-level routing, one or one a stage. mixer: another token mixer by name
    or "file.py:Class" in every block.
    """

    regions: int = 7
    mlp_ratio: float | tuple[float, ...] = 3.0
    head_dim: int = 32
    position: int = 3
    mlp_dwconv: bool = False
    layer_scale: float | None = None
    pre_norm: bool = True
    form: Form = "released"
    norm: Norm = "layer"
    routing: RoutingSpec | tuple[RoutingSpec, ...] = field(default_factory=RoutingSpec)
    mixer: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("form", Form), ("norm", Norm)):
            if getattr(self, name) not in get_args(kind):
                legal = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"BlockSpec: {name}={getattr(self, name)!r}; legal: {legal}.")
        if self.position < 0 or (self.position and self.position % 2 == 0):
            raise ValueError(f"BlockSpec: position={self.position} must be odd or 0, for example {self.position + 1}.")


class Block(nn.Module):
    """x += convolution(x); x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        nchw = spec.form == "nchw"
        self.pre_norm = spec.pre_norm
        if spec.position:
            self.pos_embed = nn.Conv2d(dim, dim, spec.position, padding=spec.position // 2, groups=dim)
        self.norm1 = LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=EPS)
        hidden = int(mlp_ratio * dim)
        if nchw:
            self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))
        else:
            between = DepthwiseConv(hidden) if spec.mlp_dwconv else nn.Identity()
            self.mlp = nn.Sequential(nn.Linear(dim, hidden), between, nn.GELU(), nn.Linear(hidden, dim))
        self.gamma1, self.gamma2 = gamma(dim, spec.layer_scale), gamma(dim, spec.layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        if hasattr(self, "pos_embed"):
            x = conv(self.pos_embed, x, residual=True)
        if self.pre_norm:
            x = x + self.drop_path(scaled(self.attn(self.norm1(x), stage), self.gamma1))
            return x + self.drop_path(scaled(self._feed(self.norm2(x)), self.gamma2))
        x = self.norm1(x + self.drop_path(scaled(self.attn(x, stage), self.gamma1)))
        return self.norm2(x + self.drop_path(scaled(self._feed(x), self.gamma2)))

    def _feed(self, x: Tensor) -> Tensor:
        for layer in self.mlp:
            x = apply(layer, x)
        return x


class Level(nn.Module):
    """Blocks under the key `blocks`, as the models in the layout of Swin-T name them."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class _Routed(VisionBackbone):
    """What both shapes share."""

    def build(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        tops: tuple[int, ...],
        drop_path: float,
        spec: BlockSpec,
    ) -> list[list[Block]]:
        """Check the settings, set strides and the head, and make the blocks of every stage."""
        name = type(self).__name__
        self.pyramid(dims, depths=depths, tops=tops)
        ratios = spec.mlp_ratio if isinstance(spec.mlp_ratio, tuple) else (spec.mlp_ratio,) * len(dims)
        per_stage("mlp_ratio", ratios, len(dims), name)
        routing = spec.routing if isinstance(spec.routing, tuple) else (spec.routing,) * len(dims)
        per_stage("routing", routing, len(dims), name)
        if self.features_only:
            for i, dim in enumerate(dims):
                self.add_module(f"norm{i}", LayerNorm(dim, eps=EPS))
        return [
            [Block(dim, attention(dim, top, (spec, own), j), ratio, spec, rate) for j, rate in enumerate(rates)]
            for dim, top, own, ratio, rates in zip(
                dims, tops, routing, ratios, drop_rates(drop_path, depths), strict=True
            )
        ]

    def add_head(self, norm: nn.Module) -> None:
        """The last norm and the classifier, unless the model gives features; then fresh weights."""
        if not self.features_only:
            self.norm = norm
            self.head = self.make_head(self.channels[-1])
        init_linears(self)

    def stages_of(self) -> list[list[Block]]:
        """The blocks of every stage."""
        levels = (getattr(stage, "blocks", stage) for stage in self.get_submodule("stages").children())
        return [list(level.children()) for level in levels]  # type: ignore[arg-type]

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all stages, channels last."""
        x, maps = to_nhwc(image), []
        down = list(self.get_submodule("downsample_layers").children())
        for layers, blocks in zip(down, self.stages_of(), strict=True):
            for layer in layers.children():
                x = _downsampled(layer, x)
            memory = begin((block.attn for block in blocks), x)
            for block in blocks:
                x = self.run(block, x, memory)
            maps.append(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the normalised tokens."""
        return apply(self.norm, last).mean((1, 2))

    @classmethod
    def convert(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The norms of the dense-prediction class, `extra_norms.{i}`, as `norm{i}`."""
        return {re.sub(r"^extra_norms\.(\d+)\.(norm\.)?", r"norm\1.", name): value for name, value in state.items()}


class BiFormer(_Routed):
    """The backbone of the released models.

    dims, depths: one entry a stage. tops: regions each region reads; -2 is dense attention with a convolution of its
    input, -1 dense attention, 0 convolutions instead. drop_path: rate of the last block. Any image size: maps are
    padded as `BiLevelRoutingAttention` says (the authors' dense-prediction setting).
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        tops: tuple[int, ...] = (1, 4, 16, -2),
        drop_path: float = 0.1,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        stages = self.build(dims, depths, tops, drop_path, spec)
        half = dims[0] // 2
        stem = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, 2, 1),
            nn.BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, dims[0], 3, 2, 1),
            nn.BatchNorm2d(dims[0]),
        )
        merges = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in pairwise(dims)]
        self.downsample_layers = nn.ModuleList([stem, *merges])
        self.stages = nn.ModuleList([nn.Sequential(*blocks) for blocks in stages])
        self.add_head(nn.BatchNorm2d(dims[-1]))


class BiFormerSTL(_Routed):
    """BiFormer in the layout of Swin-T: patches of 4 x 4, norm and 2 x 2 merging, no position convolutions.

    Arguments as in `BiFormer`. `spec.form` "nchw" has 1 x 1 convolutions for Linear, the refactored operator, and for
    -1 dense attention with a convolution of its values; its published weights have BatchNorm outside the blocks.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        tops: tuple[int, ...] = (1, 4, 16, -2),
        drop_path: float = 0.1,
        spec: BlockSpec = BlockSpec(mlp_ratio=4.0, position=0),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        stages = self.build(dims, depths, tops, drop_path, spec)
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), _norm(dims[0], spec.norm))
        merges = [nn.Sequential(_norm(a, spec.norm), nn.Conv2d(a, b, 2, 2)) for a, b in pairwise(dims)]
        self.downsample_layers = nn.ModuleList([stem, *merges])
        self.stages = nn.ModuleList([Level(blocks) for blocks in stages])
        self.add_head(_norm(dims[-1], spec.norm))


def attention(dim: int, top: int, specs: tuple[BlockSpec, RoutingSpec], index: int) -> nn.Module:
    """The token mixer of one block. Dense attention has 8 heads, whatever `head_dim` says, as published."""
    spec, routing = specs
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, dim // spec.head_dim, block=index)
    if spec.form == "nchw" and top == -1:
        return LepeAttention(dim, 8, routing.lepe, of_values=True, convs=True)
    if top > 0:
        kind = GridRoutingAttention if spec.form == "nchw" else BiLevelRoutingAttention
        return kind(dim, dim // spec.head_dim, spec.regions, top, routing)
    if top == 0:
        return ConvAttention(dim)
    if top in (-1, -2) and spec.form == "released":
        return LepeAttention(dim, 8, routing.lepe if top == -2 else 0)
    raise ValueError(f"BiFormer: tops has {top}; legal: 1 and more, 0, -1, or -2 (released form).")


def _norm(dim: int, kind: Norm) -> nn.Module:
    return nn.BatchNorm2d(dim) if kind == "batch" else LayerNorm(dim, eps=EPS)


def _downsampled(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of a stem or merging; what a stride without overlap does not divide is padded with zeros."""
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == layer.stride:
        x = pad_multiple(x, layer.stride)  # type: ignore[arg-type]
    return apply(layer, x)


# fmt: off
_BASE = {"dims": (96, 192, 384, 768), "depths": (4, 4, 18, 4), "drop_path": 0.4}
VARIANTS = (
    Variant("biformer_tiny", "biformer", {}, 13_142_760, 2.2, 81.4),
    Variant("biformer_small", "biformer", {"depths": (4, 4, 18, 4), "drop_path": 0.15}, 25_536_232, 4.5, 83.8),
    Variant("biformer_base", "biformer", _BASE, 56_804_968, 9.8, 84.3),
)
SWIN_SHAPED = (
    Variant("biformer_stl", "biformer", {}, 28_372_552, 4.6, 82.7,
            note="the layout of Swin-T; names of its checkpoint follow the refactored one's and are unverified"),
    Variant("biformer_stl_nchw", "biformer",
            {"tops": (1, 4, 16, -1), "spec": BlockSpec(mlp_ratio=4.0, position=0, form="nchw", norm="batch")},
            28_372_552, 4.6, 82.7),
)
# fmt: on
register_model(BiFormer, VARIANTS)
register_model(BiFormerSTL, SWIN_SHAPED)
