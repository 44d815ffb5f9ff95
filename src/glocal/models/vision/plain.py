"""One plain backbone for every token mixer: what differs between two of them is the mixer alone.

The common frame of today's backbones (MetaFormer, arXiv 2111.11418): overlapping convolutions embed and merge, a
depthwise convolution gives positions, each block is mixer and MLP with norms before.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from glocal.models.registry import Variant, register_model
from glocal.models.vision.base import VisionBackbone
from glocal.nn.blocks import (
    ConvPosition,
    DropPath,
    LayerNorm,
    Mlp,
    StridedConvEmbed,
    StridedConvMerge,
    drop_rates,
    init_linears,
)
from glocal.nn.mixer import begin, mixer


class PlainBlock(nn.Module):
    """x = x + position(x); x = x + mixer(norm1(x)); x = x + mlp(norm2(x))."""

    def __init__(self, dim: int, token_mixer: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.position = ConvPosition(dim)
        self.norm1 = LayerNorm(dim)
        self.mixer = token_mixer
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        x = self.position(x)
        x = x + self.drop_path(self.mixer(self.norm1(x), stage))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PlainBackbone(VisionBackbone):
    """The backbone.

    mixer: a name of `glocal.nn.list_mixers()` or "file.py:Class". dims, depths: one entry a level. head_dim: channels
    of a head. mlp_ratio: hidden over outer channels. mixer_spec: further keywords of the mixer.
    """

    def __init__(
        self,
        mixer: str = "dinat",
        dims: tuple[int, ...] = (48, 96, 192, 384),
        depths: tuple[int, ...] = (2, 2, 4, 2),
        head_dim: int = 24,
        mlp_ratio: float = 3.0,
        drop_path: float = 0.1,
        mixer_spec: Mapping[str, Any] | None = None,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, features_only)
        self.pyramid(dims, depths=depths)
        odd = [dim for dim in dims if dim % head_dim]
        if odd:
            raise ValueError(f"PlainBackbone: head_dim={head_dim} must divide dims={tuple(dims)}; it misses {odd}.")
        self.embed = StridedConvEmbed(in_chans, dims[0])
        self.merges = nn.ModuleList([StridedConvMerge(a, b) for a, b in pairwise(dims)])
        self.stages = nn.ModuleList()
        spec = {} if mixer_spec is None else dict(mixer_spec)
        for dim, rates in zip(dims, drop_rates(drop_path, depths), strict=True):
            blocks = [
                PlainBlock(dim, _mixer(mixer, dim, dim // head_dim, j, spec), int(dim * mlp_ratio), rate)
                for j, rate in enumerate(rates)
            ]
            self.stages.append(nn.ModuleList(blocks))
        self.add_end()
        init_linears(self)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, channels last."""
        x, maps = self.embed(image), []
        for i, blocks in enumerate(self.stages):
            x = x if i == 0 else self.merges[i - 1](x)
            stage = begin((block.mixer for block in blocks), x)  # type: ignore[union-attr]
            for block in blocks:  # type: ignore[union-attr]
                x = self.run(block, x, stage)
            maps.append(x)
        return maps

    def pool(self, last: Tensor) -> Tensor:
        """The largest of the normalised tokens, channel by channel: what a class rests on may be small."""
        return self.norm(last).amax((1, 2))


def _mixer(name: str, dim: int, heads: int, block: int, spec: dict[str, Any]) -> nn.Module:
    return mixer(name, dim, heads, block=block, **spec)


register_model(PlainBackbone, [Variant("plain_tiny", "", {}, note="for comparing token mixers: mixer='...'")])
