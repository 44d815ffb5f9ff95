"""L2ViT (arXiv 2501.16182): window attention alternates with linear attention over the whole map.

Linear in the pixels, any size, no position tables: depthwise convolutions tell tokens where they lie, and a pair of
large ones behind linear attention brings locality back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import VisionBackbone
from glocal.nn.blocks import (
    ConvPosition,
    DropPath,
    LayerNorm,
    Mlp,
    NormConvMerge,
    conv,
    drop_rates,
    pad_multiple,
    to_nhwc,
)
from glocal.nn.l2vit import UnpaddedWindowAttention
from glocal.nn.linear_attention import EnhancedLinearAttention, LocalConcentration
from glocal.nn.mixer import begin, mixer
from glocal.nn.window_attention import WindowAttention, WindowSpec


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks of a model share.

    window: side of the windows. mlp_ratio: hidden over outer channels. floor: lower limit of the row sums of linear
    attention. local: side of the convolutions behind it, 0 for none (as in the ablation). mask_padding: tokens that
    pad a map to whole windows are no keys; published weights were trained with False. mixer: another token mixer by
    name or "file.py:Class" in every block.
    """

    window: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    floor: float = 100.0
    local: int = 7
    mask_padding: bool = False
    mixer: str | None = None


class LocalBlock(nn.Module):
    """s = cpe0(x); y = cpe1(s + window attention(norm1(s))); y + mlp(norm2(y))."""

    def __init__(self, dim: int, attn: nn.Module, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConvPosition(dim) for _ in range(2)])
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = self.cpe[0](x)
        x = self.cpe[1](x + self.drop_path(self.attn(self.norm1(x), stage)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GlobalBlock(nn.Module):
    """s = cpe0(x); y = s + linear attention(norm1(s)); z = y + convolutions(norm3(y)); z + mlp(norm2(z))."""

    def __init__(self, dim: int, attn: nn.Module, spec: BlockSpec, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConvPosition(dim)])
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio))
        self.local_mp: LocalConcentration | None = None
        if spec.local:
            self.norm3 = LayerNorm(dim)
            self.local_mp = LocalConcentration(dim, spec.local)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x), stage))
        if self.local_mp is not None:
            x = x + self.drop_path(self.local_mp(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Two 3 x 3 convolutions of stride 2, each with BatchNorm, a ReLU between, then LayerNorm.

    Keys `proj.proj.{0,1,3,4}`, `norm`. Images are padded with zeros at the bottom and the right to multiples of 4.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        layers = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, 2, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, dim, 3, 2, 1),
            nn.BatchNorm2d(dim),
        )
        self.proj = nn.ModuleDict({"proj": layers})
        self.norm = LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), dim]."""
        return self.norm(conv(self.proj["proj"], pad_multiple(to_nhwc(image), 4)))


class L2ViT(VisionBackbone):
    """The backbone.

    dims, depths, heads: one entry a stage. drop_path: rate of the last block. spec: what blocks share. Even blocks of a
    stage attend inside windows, odd ones over the map.
    """

    undecayed = ("temperature",)

    def __init__(
        self,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        drop_path: float = 0.1,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.pyramid(dims, depths=depths, heads=heads)
        merges = [NormConvMerge(a, b) for a, b in pairwise(dims)]
        self.downsample_layers = nn.ModuleList([Stem(in_chans, dims[0]), *merges])
        self.stages = nn.ModuleList()
        for dim, n, rates in zip(dims, heads, drop_rates(drop_path, depths), strict=True):
            blocks = [_block(dim, n, j, spec, rate) for j, rate in enumerate(rates)]
            self.stages.append(nn.Sequential(*blocks))
        self.add_end()
        self.apply(_start)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all stages, channels last."""
        x, maps = image, []
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = down(x)
            blocks: Sequence[nn.Module] = list(stage.children())
            memory = begin((block.attn for block in blocks), x)  # type: ignore[misc]
            for block in blocks:
                x = self.run(block, x, memory)
            maps.append(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the normalised tokens."""
        return self.norm(last).mean((1, 2))


def _block(dim: int, heads: int, index: int, spec: BlockSpec, drop_path: float) -> nn.Module:
    kind = GlobalBlock if index % 2 else LocalBlock
    if spec.mixer is not None:
        return kind(dim, mixer(spec.mixer, dim, heads, block=index), spec, drop_path)
    if index % 2:
        return kind(dim, EnhancedLinearAttention(dim, heads, spec.floor, spec.qkv_bias), spec, drop_path)
    windows = UnpaddedWindowAttention if spec.mask_padding else WindowAttention
    return kind(dim, windows(dim, heads, spec.window, spec=WindowSpec(qkv_bias=spec.qkv_bias)), spec, drop_path)


def _start(layer: nn.Module) -> None:
    """Truncated normal weights and zero biases, of convolutions too."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# fmt: off
_SMALL = {"depths": (2, 2, 18, 2), "drop_path": 0.2}
_BASE = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "drop_path": 0.3}
VARIANTS = (
    Variant("l2vit_tiny", "l2vit", {}, 28_596_781, 4.7, 83.1),
    Variant("l2vit_small", "l2vit", _SMALL, 50_199_157, 9.0, 84.1),
    Variant("l2vit_base", "l2vit", _BASE, 88_577_188, 15.9, 84.4),
    Variant("l2vit_base_22k", "l2vit", _BASE, 88_577_188, 15.9, 86.0, pretrained_on="ImageNet-22K"),
    Variant("l2vit_base_22k_384", "l2vit", {**_BASE, "spec": BlockSpec(window=12)}, 88_577_188, 47.5, 87.0, size=384,
            pretrained_on="ImageNet-22K"),
)
# fmt: on
register_model(L2ViT, VARIANTS)
