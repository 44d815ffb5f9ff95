"""What the built-in image models share: noise-level embedding, feed-forward, caption encoder.

Module and parameter names are those of diffusers' classes, so that weights go from one to the other unchanged.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(level: Tensor, width: int) -> Tensor:
    """level [B] (0 to 1000) -> [B, width]: cosines, then sines, of geometric frequencies down to 1/10000."""
    speed = torch.exp(torch.arange(width // 2, device=level.device, dtype=torch.float32) * (-2 * math.log(1e4) / width))
    angles = level.float()[:, None] * speed
    return torch.cat([angles.cos(), angles.sin()], -1)


class LevelEmbedding(nn.Module):
    """Two linear maps with SiLU between: [B, inside] -> [B, dim]."""

    def __init__(self, inside: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inside, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inside] -> [B, dim]."""
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class GatedGelu(nn.Module):
    """One linear map whose second half gates the first (GEGLU, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., hidden]."""
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class TanhGelu(nn.Module):
    """A linear map and GELU in its tanh form."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., hidden]."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """net.0 widens, net.2 narrows; net.1 stands where a dropout would."""

    def __init__(self, widen: nn.Module, hidden: int, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([widen, nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        for module in self.net:
            x = module(x)
        return x


class CaptionEncoder(nn.Module):
    """Words -> vectors: a small transformer over the whole caption, padding included, as image models expect.

    tokens [B, L] long (0 pads) -> [B, L, dim]. Trained together with its image model.
    """

    def __init__(self, words: int, length: int, dim: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(words, dim)
        self.places = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x = self.words(tokens) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
