"""The built-in video diffusion transformer: small, rectified flow, attention sites that others can reach.

A transformer over space-time patches (DiT, arXiv 2212.09748) with one modulation network shared by all layers
(PixArt-alpha, arXiv 2310.00426), RMS-normalised queries and keys (arXiv 2302.05442) and rotary positions on three axes
(RoFormer, arXiv 2104.09864). It predicts the clean clip; `velocity` turns that into the rectified-flow velocity
(arXiv 2209.03003), noise minus data. Positions are rotary alone, so any canvas (T, H, W) runs.

How to reach an attention site. Every `VideoAttention` computes q, k, v after norm and rotary and calls

    out = self.core(q, k, v, site=site)      # q, k, v, out: [B, heads, N, head_dim]

`core` is a plain attribute: replace it to run another attention, put `dense_core` back to undo. `site` is an
`AttentionSite`: the module, its layer, the token canvas, and the two tensors that say what the output counts for: the
residual stream x [B, N, dim] and the gate [B, 1, dim]. The block adds `gate * proj(out)`; `contribution` splits that
sum by heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.models.generation.conditions import AttributeEmbedding, Field, TimeEmbedding, encode_condition


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a `VideoDiT`. patch: px a side of a token (one frame deep). fields: what a condition can say."""

    dim: int = 256
    layers: int = 6
    heads: int = 4
    hidden: int = 768
    patch: int = 4
    channels: int = 3
    fields: tuple[Field, ...] = ()
    rotary_base: float = 100.0

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            legal = [h for h in range(1, self.dim + 1) if self.dim % h == 0]
            nearest = min(legal, key=lambda h: abs(h - self.heads))
            raise ValueError(f"heads={self.heads}: must divide dim={self.dim}; nearest is heads={nearest}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"head dim {self.head_dim} (dim={self.dim}, heads={self.heads}): must be even and at least 6"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads


@dataclass(frozen=True)
class AttentionSite:
    """One call of one attention: what a replacement core may need besides q, k, v.

    module: the `VideoAttention`; layer: its index; canvas: tokens (T, H, W), N = T * H * W in raster order;
    residual [B, N, dim]: the stream before the attention is added; gate [B, 1, dim]: its factor.
    """

    module: VideoAttention
    layer: int
    canvas: tuple[int, int, int]
    residual: Tensor
    gate: Tensor

    def contribution(self, out: Tensor) -> Tensor:
        """What each head adds to the residual stream: out [B, heads, M, head_dim] -> [B, heads, M, dim]."""
        weight = self.module.proj.weight.unflatten(
            1, (self.module.heads, self.module.head_dim)
        )  # [dim, heads, head_dim]
        return torch.einsum("bhmd,chd->bhmc", out, weight.to(out.dtype)) * self.gate[:, None].to(out.dtype)


class AttentionCore(Protocol):
    """q, k, v [B, heads, N, head_dim] -> out of the same shape."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, site: AttentionSite) -> Tensor: ...


def dense_core(q: Tensor, k: Tensor, v: Tensor, *, site: AttentionSite) -> Tensor:
    """Exact attention over all tokens."""
    return F.scaled_dot_product_attention(q, k, v)


class VideoAttention(nn.Module):
    """Multi-head attention of one layer with a replaceable `core` (see the opening of this file)."""

    def __init__(self, dim: int, heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.layer = heads, dim // heads, layer
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.core: AttentionCore = dense_core

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, dim], rotary [2, N, head_dim / 2] -> q, k, v [B, heads, N, head_dim] after norm and rotary."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return rotate(self.q_norm(q), rotary).to(v.dtype), rotate(self.k_norm(k), rotary).to(v.dtype), v

    def forward(self, x: Tensor, rotary: Tensor, site: AttentionSite) -> Tensor:
        """x [B, N, dim], already normalised and modulated -> [B, N, dim], before the gate."""
        q, k, v = self.project(x, rotary)
        out = self.core(q, k, v, site=site)
        return self.proj(out.transpose(1, 2).flatten(2))


class VideoBlock(nn.Module):
    """Attention and feed-forward, each normalised, modulated, gated and added to the residual stream."""

    def __init__(self, config: VideoDiTConfig, layer: int) -> None:
        super().__init__()
        self.attn = VideoAttention(config.dim, config.heads, layer)
        self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)
        # The shared network gives the same six vectors to all layers; each layer shifts them by its own table.
        self.table = nn.Parameter(torch.randn(6, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, modulation: Tensor, rotary: Tensor, canvas: tuple[int, int, int]) -> Tensor:
        """x [B, N, dim], modulation [B, 6, dim] -> [B, N, dim]."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (modulation + self.table)[:, :, None].unbind(1)
        site = AttentionSite(self.attn, self.attn.layer, canvas, x, gate_a)
        x = x + gate_a * self.attn(unit(x) * (1 + scale_a) + shift_a, rotary, site)
        hidden = F.gelu(self.up(unit(x) * (1 + scale_f) + shift_f), approximate="tanh")
        return x + gate_f * self.down(hidden)


class VideoDiT(nn.Module):
    """Predicts the clean clip from a noisy one.

    forward(x, sigma, condition, times): x [B, T, C, H, W] in about [-1, 1] mixed with noise as
    (1 - sigma) * data + sigma * noise; sigma [B] in [0, 1]; condition [B, fields] long (0 = not given) or None;
    times [T] in frames (default 0, 1, 2, ...), so that frames may be left out. Returns data [B, T, C, H, W].
    """

    def __init__(self, config: VideoDiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = VideoDiTConfig() if config is None else config
        pixels = config.channels * config.patch**2
        self.embed = nn.Linear(pixels, config.dim)
        self.time = TimeEmbedding(config.dim)
        self.attributes = AttributeEmbedding([len(values) for _, values in config.fields], config.dim)
        self.modulate = nn.Linear(config.dim, 6 * config.dim)
        self.blocks = nn.ModuleList(VideoBlock(config, layer) for layer in range(config.layers))
        self.final_table = nn.Parameter(torch.randn(2, config.dim) / config.dim**0.5)
        self.final = nn.Linear(config.dim, pixels)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def sites(self) -> Iterator[VideoAttention]:
        """The attention sites in layer order."""
        for block in self.blocks:
            assert isinstance(block, VideoBlock)
            yield block.attn

    def condition(self, **wanted: str) -> Tensor:
        """Condition [1, fields] from names, for instance `model.condition(colour="red", shape="disc")`."""
        return encode_condition(self.config.fields, wanted)

    def canvas(self, x: Tensor) -> tuple[int, int, int]:
        """Token canvas (T, H, W) of a clip [B, T, C, H, W]; raises ValueError for a size the patch does not divide."""
        patch = self.config.patch
        if x.ndim != 5 or x.shape[2] != self.config.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}: need [B, T, {self.config.channels}, H, W]")
        height, width = x.shape[3:]
        if height % patch or width % patch or not (height and width and x.shape[1]):
            near = tuple(max(patch, round(size / patch) * patch) for size in (height, width))
            raise ValueError(f"x is {height} x {width} px: sides must be multiples of patch={patch}; nearest is {near}")
        return x.shape[1], height // patch, width // patch

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """See the class."""
        canvas = self.canvas(x)
        rotary = rotary_table(canvas, self.config.head_dim, self.config.rotary_base, times, x.device)
        mood = self.time(sigma) + self.attributes(condition, len(x))  # [B, dim]
        modulation = self.modulate(F.silu(mood)).unflatten(-1, (6, self.config.dim))
        h = self.embed(patches(x, self.config.patch))  # [B, N, dim]
        for block in self.blocks:
            h = block(h, modulation, rotary, canvas)
        shift, scale = (mood[:, None] + self.final_table)[:, :, None].unbind(1)
        return unpatch(self.final(unit(h) * (1 + scale) + shift), canvas, self.config.patch)

    def velocity(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """Rectified-flow velocity (noise - data) at noise level sigma [B] > 0, shape of x."""
        clean = self(x, sigma, condition)
        return (x - clean) / sigma.view(-1, 1, 1, 1, 1).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """Root-mean-square normalisation without parameters."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def patches(x: Tensor, patch: int) -> Tensor:
    """[B, T, C, H, W] -> [B, N, C * patch * patch], tokens in raster order (T, H, W)."""
    x = x.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [B, T, C, h, p, w, p]
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def unpatch(tokens: Tensor, canvas: tuple[int, int, int], patch: int) -> Tensor:
    """Inverse of `patches`: [B, N, C * patch * patch] -> [B, T, C, H, W]."""
    x = tokens.unflatten(-1, (-1, patch, patch)).unflatten(1, canvas)  # [B, T, h, w, C, p, p]
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def rotary_table(
    canvas: tuple[int, int, int], head_dim: int, base: float, times: Tensor | None, device: torch.device
) -> Tensor:
    """Cosines and sines [2, N, head_dim / 2]: a quarter of the pairs turn with time, the others with y and x."""
    pairs = head_dim // 2
    side = (pairs - pairs // 4) // 2
    counts = (pairs - 2 * side, side, side)
    if times is not None and times.shape != canvas[:1]:
        raise ValueError(f"times has shape {tuple(times.shape)}: need one time for each of the {canvas[0]} frames")
    angles = []
    for axis, (length, count) in enumerate(zip(canvas, counts, strict=True)):
        place = torch.arange(length, device=device, dtype=torch.float32)
        if axis == 0 and times is not None:
            place = times.to(device=device, dtype=torch.float32)
        speed = base ** -(torch.arange(count, device=device, dtype=torch.float32) / count)
        shape = [1, 1, 1, count]
        shape[axis] = length
        angles.append((place[:, None] * speed).view(shape).expand(*canvas, count))
    turned = torch.cat(angles, -1).reshape(-1, pairs)  # [N, pairs]
    return torch.stack([turned.cos(), turned.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn channel i together with channel i + head_dim / 2: x [B, heads, N, head_dim], rotary [2, N, head_dim / 2]."""
    cos, sin = rotary.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
