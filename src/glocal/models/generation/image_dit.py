"""The built-in image diffusion transformer: self-attention over patches, cross attention to the words of a caption.

The layers are those of Wan (arXiv 2503.20314): adaptive norms from one shared map of the noise level (PixArt-alpha,
arXiv 2310.00426), root-mean-square norms of queries and keys over all heads, rotary positions on three axes (a picture
has one frame). Names of modules and arguments are those of diffusers' WanTransformer3DModel, so that the same weights
load there, and every method for Wan attaches here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.models.generation.image_layers import FeedForward, LevelEmbedding, TanhGelu, sinusoids

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [1, N, 1, head_dim] of every token; each angle stands twice, for the two channels it turns."""


@dataclass(frozen=True)
class ImageDiTConfig:
    """Sizes of an `ImageDiT`, under the names of Wan's configuration. patch_size: frames, rows, columns of a token."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 3
    attention_head_dim: int = 32
    in_channels: int = 12
    out_channels: int = 12
    text_dim: int = 64
    freq_dim: int = 64
    ffn_dim: int = 224
    num_layers: int = 5
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        """Channels of the stream."""
        return self.num_attention_heads * self.attention_head_dim


class DiTAttnProcessor:
    """Computes one attention of the module it is given; replace `attn.processor` to run another."""

    def __call__(
        self,
        attn: DiTAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """hidden_states [B, N, C], words [B, L, C] or None for self-attention -> [B, N, C]."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, N, H, D]
        if rotary_emb is not None:
            q, k = turned(q, rotary_emb), turned(k, rotary_emb)
        q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
        out = F.scaled_dot_product_attention(q, k, v, attention_mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class DiTAttention(nn.Module):
    """Projections of one attention; `processor` computes it."""

    fused_projections = False  # as in Wan: one layer for each of queries, keys, values

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.inner_dim = heads, dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)
        self.processor = DiTAttnProcessor()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """See `DiTAttnProcessor`."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class DiTBlock(nn.Module):
    """Self-attention, words, feed-forward; the first and the last are shifted, scaled and gated by the noise level."""

    def __init__(self, config: ImageDiTConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_attention_heads, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = DiTAttention(dim, heads, eps)
        self.attn2 = DiTAttention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.ffn = FeedForward(TanhGelu(dim, config.ffn_dim), config.ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Rotary) -> Tensor:
        """hidden_states [B, N, C], words [B, L, C], temb [B, 6, C] -> [B, N, C]."""
        x = hidden_states
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.scale_shift_table + temb).chunk(6, 1)  # [B, 1, C]
        x = x + gate_a * self.attn1(self.norm1(x) * (1 + scale_a) + shift_a, None, None, rotary_emb)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states, None, None)
        return x + gate_f * self.ffn(self.norm3(x) * (1 + scale_f) + shift_f)


class Conditions(nn.Module):
    """Noise level and words -> what the blocks take of them."""

    def __init__(self, config: ImageDiTConfig) -> None:
        super().__init__()
        self.waves = config.freq_dim
        self.time_embedder = LevelEmbedding(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TextProjection(config.text_dim, config.dim)

    def forward(self, timestep: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """timestep [B], words [B, L, text_dim] -> [B, C], [B, 6, C], [B, L, C]."""
        level = self.time_embedder(sinusoids(timestep, self.waves))
        return level, self.time_proj(F.silu(level)).unflatten(1, (6, -1)), self.text_embedder(words)


class TextProjection(nn.Module):
    """Two linear maps with GELU between: [B, L, text_dim] -> [B, L, dim]."""

    def __init__(self, inside: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inside, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class RotaryPositions(nn.Module):
    """Angles of each token of a grid: channels are split among frame, row and column, about a third each."""

    def __init__(self, head_dim: int, patch: tuple[int, int, int], base: float = 10000.0) -> None:
        super().__init__()
        side = 2 * (head_dim // 6)
        self.widths = (head_dim - 2 * side, side, side)
        self.patch, self.base = patch, base

    def forward(self, hidden_states: Tensor) -> Rotary:
        """Latents [B, C, F, H, W] -> cosines and sines [1, N, 1, head_dim], tokens in raster order."""
        grid = tuple(n // p for n, p in zip(hidden_states.shape[2:], self.patch, strict=True))
        places = [torch.arange(n, device=hidden_states.device, dtype=torch.float64) for n in grid]
        return self.at(places)

    def at(self, places: list[Tensor]) -> Rotary:
        """Tables of the grid whose tokens lie at `places`: frames [F], rows [H], columns [W]."""
        grid = tuple(len(p) for p in places)
        angles = []
        for axis, (place, width) in enumerate(zip(places, self.widths, strict=True)):
            speed = self.base ** -(torch.arange(0, width, 2, device=place.device, dtype=torch.float64) / width)
            shape = [1, 1, 1, width // 2]
            shape[axis] = len(place)
            angles.append((place.double()[:, None] * speed).view(shape).expand(*grid, -1))
        whole = torch.cat(angles, -1).flatten(0, 2).repeat_interleave(2, -1)[None, :, None]  # [1, N, 1, D]
        return whole.cos().float(), whole.sin().float()


def turned(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn channels 2 i and 2 i + 1 together: x [B, N, H, D] -> the same shape."""
    cos, sin = rotary[0][..., 0::2].to(x.dtype), rotary[1][..., 1::2].to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class ImageDiT(nn.Module):
    """Predicts clean latents from noisy ones.

    forward(hidden_states [B, C, F, H, W], timestep [B] from 0 to 1000, encoder_hidden_states [B, L, text_dim]) ->
    (latents of the same shape,). A picture has F = 1; H and W are multiples of the patch.
    """

    def __init__(self, config: ImageDiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = ImageDiTConfig() if config is None else config
        self.rope = RotaryPositions(config.attention_head_dim, config.patch_size)
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, config.patch_size, config.patch_size)
        self.condition_embedder = Conditions(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        pixels = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.proj_out = nn.Linear(config.dim, config.out_channels * pixels)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        for layer in (self.condition_embedder.time_proj, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = False,
        attention_kwargs: dict[str, object] | None = None,
    ) -> tuple[Tensor]:
        """See the class. The last three arguments keep Wan's signature: no image prompt is understood."""
        if encoder_hidden_states_image is not None or return_dict or attention_kwargs:
            raise ValueError(
                "ImageDiT takes latents, timestep and words; legal: encoder_hidden_states_image=None, "
                "return_dict=False, attention_kwargs=None"
            )
        patch = self.config.patch_size
        if hidden_states.ndim != 5 or any(n % p for n, p in zip(hidden_states.shape[2:], patch, strict=True)):
            raise ValueError(
                f"latents have shape {tuple(hidden_states.shape)}; legal: [B, C, F, H, W] with sides that are "
                f"multiples of the patch {patch}"
            )
        rotary = self.rope(hidden_states)
        grid = tuple(n // p for n, p in zip(hidden_states.shape[2:], patch, strict=True))
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # [B, N, C]
        level, temb, words = self.condition_embedder(timestep, encoder_hidden_states)
        for block in self.blocks:
            x = block(x, words, temb, rotary)
        shift, scale = (self.scale_shift_table + level[:, None]).chunk(2, 1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)  # [B, N, patch * C]
        x = x.unflatten(1, grid).unflatten(-1, (*patch, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return (x.flatten(6).flatten(4, 5).flatten(2, 3),)
