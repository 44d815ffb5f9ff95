"""The built-in language model: a small decoder over bytes, with attention sites that others can reach.

A pre-norm decoder in the form of Llama (arXiv 2302.13971): RMS norms, rotary positions (RoFormer, arXiv 2104.09864) on
a part of the channels (GPT-NeoX, arXiv 2204.06745), grouped key heads (arXiv 2305.13245), a gated feed-forward (arXiv
2002.05202), tied embeddings. q, k and v pass a short causal convolution of each channel (Primer, arXiv 2109.08668): so
small a model learns to look things up much sooner with it. Its tokens are the 256 bytes of UTF-8, so any text file can
be read without a tokenizer.

How to reach an attention site: every `DecoderAttention` computes q, k, v after rotary and calls
``self.core(q, k, v, site=site)``; `core` is a plain attribute, `dense_core` is what stands there from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `Decoder`. kv_heads: key heads, each shared by heads / kv_heads query heads. rotary_share: part of a
    head's channels that carry the position; the others compare contents alike at any distance. taps: tokens that the
    convolution of q, k and v sees, the present one the last.
    """

    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 192
    rotary_base: float = 10_000.0
    rotary_share: float = 0.25
    taps: int = 4

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"heads={self.heads}: dim={self.dim} must split into that many heads of even size")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if not 0 <= self.rotary_share <= 1:
            raise ValueError(f"rotary_share={self.rotary_share}: must lie in 0 <= rotary_share <= 1")
        if self.taps < 1:
            raise ValueError(f"taps={self.taps}: must be at least 1, which is no convolution over tokens")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads

    @property
    def rotary_dim(self) -> int:
        """Channels of one head that turn with the position; even."""
        return int(self.head_dim * self.rotary_share) // 2 * 2


@dataclass(frozen=True)
class DecoderSite:
    """One call of one attention. module: the `DecoderAttention`; layer: its index; residual [B, N, dim]: the stream
    before the attention is added.
    """

    module: DecoderAttention
    layer: int
    residual: Tensor

    def contribution(self, out: Tensor) -> Tensor:
        """What each head adds to the residual stream: out [B, heads, M, head_dim] -> [B, heads, M, dim]."""
        weight = self.module.proj.weight.unflatten(1, (self.module.heads, self.module.head_dim))
        return torch.einsum("bhmd,chd->bhmc", out, weight.to(out.dtype))


class DecoderCore(Protocol):
    """q [B, heads, N, head_dim], k, v [B, kv_heads, N, head_dim] -> out, shape of q."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, site: DecoderSite) -> Tensor: ...


def dense_core(q: Tensor, k: Tensor, v: Tensor, *, site: DecoderSite) -> Tensor:
    """Exact causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class DecoderAttention(nn.Module):
    """Causal attention of one layer with a replaceable `core`."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.layer = config.heads, config.kv_heads, config.head_dim, layer
        self.q = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.kv = nn.Linear(config.dim, 2 * config.kv_heads * config.head_dim, bias=False)
        channels = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.taps = nn.Parameter(torch.zeros(channels, config.taps))  # the last column is the present token
        nn.init.uniform_(self.taps, -(config.taps**-0.5), config.taps**-0.5)
        self.proj = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)
        self.core: DecoderCore = dense_core

    def forward(self, x: Tensor, rotary: Tensor, site: DecoderSite) -> Tensor:
        """x [B, N, dim], normalised -> [B, N, dim]."""
        mixed = short_convolution(torch.cat([self.q(x), self.kv(x)], -1), self.taps)
        q, kv = mixed.split([self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim], -1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, head_dim]
        k, v = kv.unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.core(_rotate(q, rotary), _rotate(k, rotary), v, site=site)
        return self.proj(out.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Attention and gated feed-forward, each normalised and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-6), nn.RMSNorm(config.dim, eps=1e-6)
        self.attn = DecoderAttention(config, layer)
        self.up = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x [B, N, dim] -> [B, N, dim]."""
        x = x + self.attn(self.attn_norm(x), rotary, DecoderSite(self.attn, self.attn.layer, x))
        gate, value = self.up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Decoder(nn.Module):
    """Predicts the next byte. forward(ids [B, N] long, keep=None) -> logits [B, N, 256], or [B, len(keep), 256] of the
    positions `keep` [P] alone.
    """

    def __init__(self, config: DecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = DecoderConfig() if config is None else config
        self.embed = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        nn.init.normal_(self.embed.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            for linear in (block.attn.proj, block.down):  # small steps at the start, as many layers add up
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.layers) ** 0.5)

    def sites(self) -> Iterator[DecoderAttention]:
        """The attention sites in layer order."""
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            yield block.attn

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """See the class."""
        if ids.dim() != 2 or ids.dtype != torch.long:
            raise ValueError(f"ids has shape {tuple(ids.shape)} and dtype {ids.dtype}: need [B, N] of torch.long")
        rotary = _rotary_table(ids.shape[1], self.config, ids.device)
        x = self.embed(ids)  # [B, N, dim]
        for block in self.blocks:
            x = block(x, rotary)
        x = self.norm(x if keep is None else x[:, keep])
        return F.linear(x, self.embed.weight.to(x.dtype))


def short_convolution(x: Tensor, taps: Tensor) -> Tensor:
    """Each channel over the last T tokens: ``y[n] = sum_t taps[:, t] x[n + t + 1 - T]``, zeros before the text.

    x [B, N, C], taps [C, T] -> [B, N, C].
    """
    width = taps.shape[1]
    early = F.pad(x, (0, 0, width - 1, 0))  # [B, N + T - 1, C]
    weights = taps.to(x.dtype)
    out = x * weights[:, -1]
    for t in range(width - 1):
        out = out + early[:, t : t + x.shape[1]] * weights[:, t]
    return out


def encode(text: str) -> list[int]:
    """A text as tokens: its bytes in UTF-8."""
    return list(text.encode())


def _rotary_table(tokens: int, config: DecoderConfig, device: torch.device) -> Tensor:
    """Cosines and sines [2, N, rotary_dim / 2]."""
    pairs = config.rotary_dim // 2
    speed = config.rotary_base ** -(torch.arange(pairs, device=device, dtype=torch.float32) / max(pairs, 1))
    angle = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * speed
    return torch.stack([angle.cos(), angle.sin()])


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn channel i together with channel i + rotary_dim / 2, leave those behind: x [B, heads, N, head_dim]."""
    cos, sin = rotary.to(x.dtype)
    pairs = cos.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
