"""Blocks of the built-in image UNet: those of Stable Diffusion (arXiv 2112.10752), under diffusers' names.

Every stage, transformer and resampler has the arguments that methods for UNets rely on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.models.generation.image_layers import FeedForward, GatedGelu

GROUPS = 8
"""Groups of every group normalisation."""


class UNetAttnProcessor:
    """Computes one attention of the module it is given; replace `attn.processor` to run another."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, N, C], words [B, L, text] or None for self-attention -> [B, N, C]."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
        out = F.scaled_dot_product_attention(q, k, v, attention_mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """Projections of one attention; `processor` computes it."""

    def __init__(self, dim: int, heads: int, source: int) -> None:
        super().__init__()
        self.heads, self.inner_dim = heads, dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(source, dim, bias=False)
        self.to_v = nn.Linear(source, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.processor = UNetAttnProcessor()

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """See `UNetAttnProcessor`."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class BasicTransformerBlock(nn.Module):
    """Self-attention, words, gated feed-forward, each with a norm before it."""

    def __init__(self, dim: int, heads: int, text: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2 = Attention(dim, heads, dim), Attention(dim, heads, text)
        self.ff = FeedForward(GatedGelu(dim, 4 * dim), 4 * dim, dim)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[B, N, C], words [B, L, text] -> [B, N, C]."""
        x = hidden_states
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """One transformer block over the pixels of a map, in raster order."""

    def __init__(self, dim: int, heads: int, text: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(dim, heads, text)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        """[B, C, H, W], words [B, L, text] -> ([B, C, H, W],)."""
        x = self.proj_in(self.norm(hidden_states))
        tokens = x.flatten(2).transpose(1, 2)  # [B, H * W, C]
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states)
        x = tokens.transpose(1, 2).unflatten(2, x.shape[-2:]).contiguous()
        return (self.proj_out(x) + hidden_states,)


class ResnetBlock2D(nn.Module):
    """Two convolutions, the noise level added between them: [B, inside, H, W] -> [B, outside, H, W]."""

    def __init__(self, inside: int, outside: int, level: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, inside, eps=1e-5), nn.GroupNorm(GROUPS, outside, eps=1e-5)
        self.conv1, self.conv2 = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        self.time_emb_proj = nn.Linear(level, outside)
        self.conv_shortcut = None if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """See the class; temb [B, level]."""
        x = self.conv1(F.silu(self.norm1(hidden_states)))
        x = x + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        x = self.conv2(F.silu(self.norm2(x)))
        return x + (hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states))


class Downsample2D(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2], sides rounded up."""
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    """Nearest pixels, then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, H, W] -> twice the sides, or `output_size`."""
        size = tuple(2 * n for n in hidden_states.shape[-2:]) if output_size is None else tuple(output_size)
        return self.conv(F.interpolate(hidden_states, size, mode="nearest"))


class DownBlock2D(nn.Module):
    """A stage on the way down: residual blocks, then (not in the last stage) a downsampler."""

    def __init__(self, inside: int, outside: int, level: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(inside, outside, level)])
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(outside)])

    def forward(
        self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[B, C, H, W] -> the map that goes on, and the maps that skip to the way up."""
        x, skips = hidden_states, ()
        attentions = getattr(self, "attentions", (None,) * len(self.resnets))
        for resnet, attention in zip(self.resnets, attentions, strict=True):
            x = resnet(x, temb)
            x = x if attention is None else attention(x, encoder_hidden_states=encoder_hidden_states)[0]
            skips = (*skips, x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips = (*skips, x)
        return x, skips


class CrossAttnDownBlock2D(DownBlock2D):
    """A `DownBlock2D` with a transformer behind each residual block."""

    def __init__(self, inside: int, outside: int, level: int, last: bool, *, heads: int, text: int) -> None:
        super().__init__(inside, outside, level, last)
        self.attentions = nn.ModuleList(Transformer2D(outside, heads, text) for _ in self.resnets)


class UpBlock2D(nn.Module):
    """A stage on the way up: residual blocks that take one skip each, then (not in the last stage) an upsampler."""

    def __init__(self, before: int, skips: tuple[int, ...], outside: int, level: int, last: bool) -> None:
        super().__init__()
        inside = [before, *[outside] * (len(skips) - 1)]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(own + skip, outside, level) for own, skip in zip(inside, skips, strict=True)
        )
        self.upsamplers = None if last else nn.ModuleList([Upsample2D(outside)])

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor,
        encoder_hidden_states: Tensor,
        upsample_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """[B, C, H, W] and as many skips as residual blocks, the last one first -> [B, C', 2 H, 2 W]."""
        x = hidden_states
        attentions = getattr(self, "attentions", (None,) * len(self.resnets))
        for resnet, attention, skip in zip(self.resnets, attentions, reversed(res_hidden_states_tuple), strict=True):
            x = resnet(torch.cat([x, skip], 1), temb)
            x = x if attention is None else attention(x, encoder_hidden_states=encoder_hidden_states)[0]
        return x if self.upsamplers is None else self.upsamplers[0](x, upsample_size)


class CrossAttnUpBlock2D(UpBlock2D):
    """An `UpBlock2D` with a transformer behind each residual block."""

    def __init__(
        self, before: int, skips: tuple[int, ...], outside: int, level: int, last: bool, *, heads: int, text: int
    ) -> None:
        super().__init__(before, skips, outside, level, last)
        self.attentions = nn.ModuleList(Transformer2D(outside, heads, text) for _ in self.resnets)


class UNetMidBlock2DCrossAttn(nn.Module):
    """Between the ways: residual block, transformer, residual block."""

    def __init__(self, dim: int, level: int, heads: int, text: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(dim, dim, level) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2D(dim, heads, text)])

    def forward(self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.resnets[0](hidden_states, temb)
        return self.resnets[1](self.attentions[0](x, encoder_hidden_states=encoder_hidden_states)[0], temb)
