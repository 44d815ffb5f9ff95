"""The attention of UltraGen (arXiv 2510.18775): windows of two levels and a compressed global branch, gated by time.

The tokens of a video, [T, H, W], go through the projections of a pretrained attention three times: as they are, in
K x K windows of all frames (every second layer cuts K + 1 x K + 1, so that borders of one layer lie inside windows of
the next); compressed 2 x 2, in half as many windows a side; and compressed k x k, all together. Compressed branches
have low-rank updates of their own ("domain-aware LoRA"), start as average pooling and are brought back by bilinear
enlargement and a convolution that starts as the identity. Gates that depend on the noise level alone mix them, channel
by channel. Only a paper is public: what it leaves open is decided here and listed on the system's page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn.blocks.rotary import Rotary, cell_centres
from glocal.nn.lora import LowRank
from glocal.ops import attention, depthwise_conv, merge
from glocal.ops.fold import window_attention, window_pairs
from glocal.patterns.windows import Windows

WAVES = 256
"""Channels of the sinusoidal code of a noise level."""


@dataclass(frozen=True)
class UltraGenSettings:
    """windows: K, windows a side of the plane in even layers. cross_window: "alternating" cuts one more a side in odd
    layers, "fixed" does not, "shift" rolls them by half a window there and masks what wraps around (Swin).

    global_branch, global_stride: compressed attention over all tokens, and k. hierarchical, coarse_stride: the second
    level, K / 2 windows a side (one more in odd layers) of compressed tokens. rank: of the updates of queries, keys and
    values in compressed branches; None: none. ffn_lora: such updates of the feed-forward layers too. conv: the
    3 x 3 x 3 convolution behind the enlargement mixes all channels ("dense") or none ("depthwise").
    """

    windows: int = 4
    cross_window: Literal["alternating", "fixed", "shift"] = "alternating"
    global_branch: bool = True
    global_stride: int = 4
    hierarchical: bool = True
    coarse_stride: int = 2
    rank: int | None = 64
    ffn_lora: bool = False
    conv: Literal["dense", "depthwise"] = "dense"

    def __post_init__(self) -> None:
        for name in ("windows", "global_stride", "coarse_stride", "rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"ultragen: {name}={value!r} must be a whole number of at least 1.")
        for name, legal in (
            ("cross_window", ("alternating", "fixed", "shift")),
            ("conv", ("dense", "depthwise")),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"ultragen: {name}={getattr(self, name)!r}; legal: {', '.join(map(repr, legal))}.")
        if self.ffn_lora and self.rank is None:
            raise ValueError("ultragen: ffn_lora=True with rank=None has no size; legal: rank=64, or ffn_lora=False.")

    def pattern(self, axes: Sequence[int], layer: int, level: Literal["fine", "coarse"] = "fine") -> Windows:
        """The windows of a layer over axes (T, H, W): of the tokens, or of those of the coarse level."""
        count = self.windows if level == "fine" else max(self.windows // 2, 1)
        odd = layer % 2 == 1
        if odd and self.cross_window == "alternating":
            count += 1
        roll = tuple(-(-n // count) // 2 for n in axes[1:]) if odd and self.cross_window == "shift" else (0, 0)
        return Windows(count=(1, count, count), roll=(0, *roll))

    def cells(self, axes: Sequence[int], branch: Literal["global", "coarse"]) -> tuple[int, int, int]:
        """Axes (T, H, W) of the tokens of a compressed branch."""
        k = self.global_stride if branch == "global" else self.coarse_stride
        return axes[0], -(-axes[1] // k), -(-axes[2] // k)

    def pairs(self, axes: Sequence[int], layer: int) -> dict[str, int]:
        """Pairs of queries and keys by branch; full attention has the square of the tokens.

        In even layers whose windows and cells divide the plane their sum is the published share of that,
        5 / (4 K^2) + 1 / K^4.
        """
        found = {"fine": window_pairs(self.pattern(axes, layer), axes)}
        if self.hierarchical:
            cells = self.cells(axes, "coarse")
            found["coarse"] = window_pairs(self.pattern(cells, layer, "coarse"), cells)
        if self.global_branch:
            found["global"] = prod(self.cells(axes, "global")) ** 2
        return found


class Projections(Protocol):
    """What the pretrained attention lends: both ends of it, without the attention between them."""

    def qkv(self, x: Tensor, rotary: Rotary | None, updates: Mapping[str, LowRank]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, M, C] -> q, k, v [B, H, M, D] after norms and rotary; updates: of "q", "k", "v", may be empty."""
        ...

    def out(self, x: Tensor) -> Tensor:
        """[B, H, M, D] -> [B, M, C]."""
        ...


class TimeGate(nn.Module):
    """alpha(t) in (0, 1), one number a channel, from the noise level alone; 1/2 everywhere before training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVES, dim), nn.SiLU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[2].bias)  # type: ignore[arg-type]

    def forward(self, level: Tensor) -> Tensor:
        """Noise levels [B] or [B, N], 1000 is pure noise -> [B, 1 or N, dim]."""
        level = level[:, None] if level.dim() == 1 else level
        speed = torch.exp(-math.log(10000) * torch.arange(WAVES // 2, device=level.device) / (WAVES // 2))
        angles = level.float()[..., None] * speed
        waves = torch.cat([angles.cos(), angles.sin()], -1)  # [B, N, 256]
        return self.mlp(waves.to(self.mlp[0].weight.dtype)).sigmoid()  # type: ignore[union-attr]


class CompressedBranch(nn.Module):
    """Fewer tokens on the way in, all of them on the way out, and the updates in between."""

    def __init__(self, dim: int, inner: int, stride: int, settings: UltraGenSettings) -> None:
        super().__init__()
        self.stride = stride
        self.down = nn.Conv2d(dim, dim, stride, stride, groups=dim, bias=False)
        nn.init.constant_(self.down.weight, 1 / stride**2)
        groups = dim if settings.conv == "depthwise" else 1
        self.up = nn.Conv3d(dim, dim, 3, padding=1, groups=groups)
        nn.init.dirac_(self.up.weight, groups)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]
        if settings.rank is not None:
            for name in "qkv":
                self.add_module(f"lora_{name}", LowRank.fresh(nn.Linear(dim, inner), settings.rank))

    @property
    def updates(self) -> dict[str, LowRank]:
        """Of queries, keys and values by their letter; empty without."""
        found = {name: getattr(self, f"lora_{name}", None) for name in "qkv"}
        return {name: update for name, update in found.items() if update is not None}

    def compress(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """x [B, T * H * W, C] -> [B, T * H' * W', C]; zeros fill the last cells at the bottom and on the right."""
        frames, height, width = axes
        maps = x.unflatten(1, (frames, height, width)).flatten(0, 1)  # [B * T, H, W, C]
        pads = (0, -height % self.stride, 0, -width % self.stride)
        cells = depthwise_conv(maps, self.down.weight.to(x.dtype), stride=self.stride, padding=pads)
        return cells.unflatten(0, (-1, frames)).flatten(1, 3)

    def restore(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """[B, T * H' * W', C] -> [B, T * H * W, C]: bilinear, cell centres aligned, then the convolution."""
        frames, height, width = axes
        cells = (-(-height // self.stride), -(-width // self.stride))
        maps = x.unflatten(1, (frames, *cells)).flatten(0, 1).movedim(-1, 1)  # [B * T, C, H', W']
        maps = F.interpolate(maps, scale_factor=float(self.stride), mode="bilinear", align_corners=False)
        maps = maps[..., :height, :width].movedim(1, -1)  # [B * T, H, W, C]
        weight, bias = self.up.weight.to(x.dtype), self.up.bias
        bias = None if bias is None else bias.to(x.dtype)
        if self.up.groups > 1:
            return _depthwise(maps.unflatten(0, (-1, frames)), weight, bias).flatten(1, 3)
        maps = maps.unflatten(0, (-1, frames)).movedim(-1, 1)  # [B, C, T, H, W]
        return F.conv3d(maps, weight, bias, padding=1).flatten(2).transpose(1, 2)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, T, H, W, C] under kernels [C, 1, 3, 3, 3] of each channel: one plane of the kernel after the other."""
    maps = x.flatten(0, 1).contiguous()
    before, here, after = (
        depthwise_conv(maps, weight[:, :, n], bias if n == 1 else None, padding=(1, 1, 1, 1)).view_as(x)
        for n in range(3)
    )
    none = torch.zeros_like(here[:, :1])
    return here + torch.cat([none, before[:, :-1]], 1) + torch.cat([after[:, 1:], none], 1)


class HierarchicalAttention(nn.Module):
    """The trained parts of one layer; the projections are those of the attention it replaces.

    dim: channels of the stream; inner: of queries, keys and values (heads x head size); layer: counts from 0.
    Its parts are called `global_`, `hier`, `gate_global`, `gate_hier`; a branch that is off has none.
    """

    def __init__(self, dim: int, inner: int, layer: int, settings: UltraGenSettings) -> None:
        super().__init__()
        self.layer, self.settings = layer, settings
        for branch, gate, on, stride in (
            ("global_", "gate_global", settings.global_branch, settings.global_stride),
            ("hier", "gate_hier", settings.hierarchical, settings.coarse_stride),
        ):
            if on:
                self.add_module(branch, CompressedBranch(dim, inner, stride, settings))
                self.add_module(gate, TimeGate(dim))

    def forward(
        self,
        x: Tensor,
        axes: Sequence[int],
        level: Tensor,
        host: Projections,
        rotary: Rotary | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """x [B, N, dim], normalised and modulated, N = T * H * W in raster order -> [B, N, dim].

        axes: (T, H, W). level: noise level [B] or [B, N], 1000 is pure noise. rotary: [N, channels] each, None where
        positions are in x. Raises ValueError where the tokens do not fill the grid.
        """
        if len(axes) != 3 or x.shape[1] != prod(axes):
            raise ValueError(
                f"ultragen: {x.shape[1]} tokens do not fill (frames, rows, columns) = {tuple(axes)}; legal: the whole "
                "video in raster order."
            )
        q, k, v = host.qkv(x, rotary, {})
        out = host.out(window_attention(q, k, v, self.settings.pattern(axes, self.layer), axes, backend=backend))
        if self.settings.hierarchical:
            coarse = self._branch("hier", x, axes, host, rotary, backend)
            out = merge.gate(self.gate("hier", level).to(out), coarse, out)
        if self.settings.global_branch:
            whole = self._branch("global_", x, axes, host, rotary, backend)
            out = merge.gate(self.gate("global", level).to(out), whole, out)
        return out

    def gate(self, branch: Literal["global", "hier"], level: Tensor) -> Tensor:
        """Share of a branch, [B, 1 or N, dim]."""
        return self.get_submodule(f"gate_{branch}")(level)

    def _branch(
        self,
        name: Literal["global_", "hier"],
        x: Tensor,
        axes: Sequence[int],
        host: Projections,
        rotary: Rotary | None,
        backend: str,
    ) -> Tensor:
        part = self.get_submodule(name)
        assert isinstance(part, CompressedBranch)
        stride = (1, part.stride, part.stride)
        there = None if rotary is None else cell_centres(rotary, axes, stride)
        q, k, v = host.qkv(part.compress(x, axes), there, part.updates)
        if name == "global_":
            out = attention(q, k, v, backend=backend)
        else:
            cells = self.settings.cells(axes, "coarse")
            pattern = self.settings.pattern(cells, self.layer, "coarse")
            out = window_attention(q, k, v, pattern, cells, backend=backend)
        return part.restore(host.out(out), axes)
