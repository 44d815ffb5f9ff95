"""PVT v2 (arXiv 2106.13797) under the authors' key names, any image size.

Patches overlap and MLPs hold a depthwise convolution, so that there are no tables of positions. The linear form reads
the means of 7 x 7 cells of a map, whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.trunks._blocks import through
from glocal.models.vision.base import VisionBackbone
from glocal.nn.blocks import ConvMlp, DropPath, LayerNorm, PatchEmbed, drop_rates, init_linears, to_nchw
from glocal.nn.mixer import mixer
from glocal.nn.spatial_reduction import SpatialReductionAttention


@dataclass(frozen=True)
class BlockSpec:
    """What the blocks share. ratios: hidden over outer channels, one a stage. reductions: sides of the cells that
    become keys, one a stage. linear: the linear form. mixer: another token mixer by name or "file.py:Class".
    """

    ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    linear: bool = False
    mixer: str | None = None


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)), with a convolution in the MLP."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, rectified: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), rectified=rectified)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), stage))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PVTv2(VisionBackbone):
    """dims, depths, heads: one entry a stage. drop_path: rate of the last block. spec: what the blocks share."""

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        heads: tuple[int, ...] = (1, 2, 5, 8),
        drop_path: float = 0.1,
        spec: BlockSpec = BlockSpec(),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.pyramid(dims, depths=depths, heads=heads, reductions=spec.reductions, ratios=spec.ratios)
        widths = pairwise((in_chans, *dims))
        for i, (rates, (before, dim)) in enumerate(zip(drop_rates(drop_path, depths), widths, strict=True)):
            attns = [_attention(dim, heads[i], spec, i, j) for j in range(depths[i])]
            blocks = [Block(dim, a, spec.ratios[i], r, spec.linear) for a, r in zip(attns, rates, strict=True)]
            embed = PatchEmbed(before, dim, patch=2 if i else 4, kernel=3 if i else 7)
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", LayerNorm(dim, eps=1e-6))
        self.head = nn.Identity() if features_only else self.make_head(dims[-1])
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Normalised maps of all stages, channels last."""
        x, maps = image, []
        for i in range(1, len(self.channels) + 1):
            x = through(self, self.get_submodule(f"patch_embed{i}")(x), self.get_submodule(f"block{i}"))
            maps.append(self.get_submodule(f"norm{i}")(x))
            x = to_nchw(maps[-1])
        return maps

    def features(self, image: Tensor) -> list[Tensor]:
        """The levels as [B, channels[i], h, w]; their norms are part of the walk."""
        self._check(image)
        return [to_nchw(level) for level in self.maps(image)]

    def pool(self, last: Tensor) -> Tensor:
        """Mean of the normalised tokens."""
        return last.mean((1, 2))


def _attention(dim: int, heads: int, spec: BlockSpec, stage: int, index: int) -> nn.Module:
    if spec.mixer is not None:
        return mixer(spec.mixer, dim, heads, block=index)
    return SpatialReductionAttention(dim, heads, spec.reductions[stage], 7 if spec.linear else None)


_SMALL, _EVEN = {"dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)}, BlockSpec(ratios=(4.0, 4.0, 4.0, 4.0))
register_model(
    PVTv2,
    (
        Variant("pvt_v2_b0", "", _SMALL, 3_666_760, 0.57, 70.5),
        Variant("pvt_v2_b1", "", {"depths": (2, 2, 2, 2)}, 14_009_000, 2.1, 78.7),
        Variant("pvt_v2_b2", "", {}, 25_362_856, 4.0, 82.0),
        Variant("pvt_v2_b2_li", "", {"spec": BlockSpec(linear=True)}, 22_553_512, 3.9, 82.1),
        Variant("pvt_v2_b3", "", {"depths": (3, 4, 18, 3), "drop_path": 0.3}, 45_238_696, 6.9, 83.1),
        Variant("pvt_v2_b4", "", {"depths": (3, 8, 27, 3), "drop_path": 0.3}, 62_556_072, 10.1, 83.6),
        Variant("pvt_v2_b5", "", {"depths": (3, 6, 40, 3), "drop_path": 0.3, "spec": _EVEN}, 81_956_008, 11.8, 83.8),
    ),
)
