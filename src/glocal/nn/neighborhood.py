"""Neighbourhood attention as a layer (arXiv 2204.07143, 2209.15001, 2403.04690, 2504.16922).

Every token attends to a window around it: qkv projection, attention over `Neighborhood`, output projection. State keys
are those of the published layers: `qkv.*`, `proj.*`, and `rpb` where there is a relative bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from glocal.nn._canvas import canvas_of, small_windows
from glocal.nn._heads import check_heads, split_heads
from glocal.ops import Relative, Score, attention
from glocal.patterns import Neighborhood
from glocal.patterns.neighborhood import per_axis

SmallMaps = Literal["error", "pad"]


@dataclass(frozen=True)
class NeighborhoodSpec:
    """What is rarely changed.

    small_maps: a map shorter than window x dilation is an "error", or "pad": zeros are put behind its end before the
        qkv projection and are ordinary keys (they carry its bias); published NAT and DiNAT weights expect this.
    scale: factor on the logits; None is head size ** -0.5.
    attn_drop, proj_drop: dropout of attention weights and of the output, in training.
    backend: passed to `glocal.ops.attention`.
    """

    small_maps: SmallMaps = "error"
    qkv_bias: bool = True
    scale: float | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.small_maps not in ("error", "pad"):
            raise ValueError(f"NeighborhoodSpec: small_maps={self.small_maps!r}; legal: 'error', 'pad'.")
        for name in ("attn_drop", "proj_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"NeighborhoodSpec: {name}={getattr(self, name)} must lie in [0, 1).")


class _NeighborhoodAttention(nn.Module):
    """The layer for maps of `rank` axes."""

    rank: int

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        dilation: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        relative_bias: bool = False,
        spec: NeighborhoodSpec = NeighborhoodSpec(),
    ) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        self.pattern = Neighborhood(window, stride, dilation, causal)
        self.window = self._axes("window", self.pattern.window)
        self.dilation = self._axes("dilation", self.pattern.dilation)
        for name in ("stride", "causal"):
            self._axes(name, getattr(self.pattern, name))
        if relative_bias and any(per_axis(self.pattern.causal, self.rank)):
            raise ValueError(
                f"{type(self).__name__}: relative_bias=True with causal={causal}; published layers have one or the "
                f"other. Leave one of them out."
            )
        self.dim, self.heads, self.spec = dim, heads, spec
        self.qkv = nn.Linear(dim, 3 * dim, bias=spec.qkv_bias)
        self.rpb: nn.Parameter | None = None
        if relative_bias:
            self.rpb = nn.Parameter(torch.zeros(heads, *(2 * k - 1 for k in self.window)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(spec.proj_drop)

    def _axes(self, name: str, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return per_axis(value, self.rank, type(self).__name__, name)

    def forward(self, x: Tensor, stage: None = None) -> Tensor:
        """x: [B, *map, dim], channels last -> the same shape. The layer keeps no stage memory: `stage` is unused.

        Raises ValueError for another number of axes or channels, and for a map that is too small for the window
        unless small maps are padded.
        """
        if x.dim() != self.rank + 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x of shape {tuple(x.shape)} must be [batch, {self.rank} map axes, {self.dim}]."
            )
        size = tuple(x.shape[1:-1])
        x = self._padded(x)
        canvas = canvas_of(*x.shape[1:-1])
        q, k, v = split_heads(self.qkv(x).flatten(1, -2), 3, self.heads)  # [B, heads, N, head size] each
        bias = () if self.rpb is None else (Relative(self.rpb, self.dilation, within=True),)
        dropout = self.spec.attn_drop if self.training else 0.0
        score = Score(self.spec.scale, bias=bias, dropout=dropout)
        backend = self.spec.backend
        if backend == "auto" and small_windows(x, self.dim // self.heads, self.pattern, dropout):
            backend = "windows"
        out = attention(q, k, v, self.pattern, canvas=canvas, score=score, backend=backend)
        out = out.transpose(1, 2).reshape(x.shape)  # [B, *map, dim]
        out = out[(slice(None), *map(slice, size))]
        return self.proj_drop(self.proj(out))

    def macs(self, x: Tensor) -> int:
        """Multiply-adds of the layer on x: [B, *map, dim]: both projections and the visible pairs."""
        padded = self._padded(x[:1, ..., :1]).shape[1:-1]
        pairs = 1
        for rule, length in zip(self.pattern.axes(padded), padded, strict=True):
            place = torch.arange(length)
            pairs *= int(rule.sees(place[:, None], place[None], length).sum())
        return x.shape[0] * self.dim * (3 * self.dim * prod(padded) + 2 * pairs + self.dim * prod(x.shape[1:-1]))

    def _padded(self, x: Tensor) -> Tensor:
        if self.spec.small_maps == "error":
            return x
        reach = (k * d for k, d in zip(self.window, self.dilation, strict=True))
        short = [max(need - have, 0) for need, have in zip(reach, x.shape[1:-1], strict=True)]
        if not any(short):
            return x
        pads = [amount for missing in reversed(short) for amount in (0, missing)]
        return nn.functional.pad(x, (0, 0, *pads))

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        rule = ", ".join(f"{name}={getattr(self.pattern, name)}" for name in ("window", "stride", "dilation", "causal"))
        return f"dim={self.dim}, heads={self.heads}, {rule}, small_maps={self.spec.small_maps!r}"


class NeighborhoodAttention1d(_NeighborhoodAttention):
    """Neighbourhood attention over sequences, x: [B, L, dim]; see `NeighborhoodAttention2d`."""

    rank = 1


class NeighborhoodAttention2d(_NeighborhoodAttention):
    """Neighbourhood attention over maps, x: [B, H, W, dim].

    dim, heads: channels and attention heads (heads divides dim).
    window, stride, dilation, causal: as in `glocal.patterns.Neighborhood`, one value or one an axis.
    relative_bias: a learned table `rpb` [heads, 2 window - 1 per axis], looked up by (key - query) / dilation.
    spec: padding of small maps, biases, scale, dropout, backend.

    The layers of NATTEN 0.20 and later are the default; those of NATTEN up to 0.14, which the published NAT and DiNAT
    weights belong to, are ``relative_bias=True, spec=NeighborhoodSpec(small_maps="pad")``. Both state layouts load
    strictly.
    """

    rank = 2


class NeighborhoodAttention3d(_NeighborhoodAttention):
    """Neighbourhood attention over volumes and videos, x: [B, T, H, W, dim]; see `NeighborhoodAttention2d`."""

    rank = 3
