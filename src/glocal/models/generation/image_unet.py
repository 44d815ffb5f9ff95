"""The built-in image UNet: stages of SDXL (arXiv 2307.01952), the largest without attention, at small width.

Names of modules and arguments are those of diffusers' UNet2DConditionModel, so that the same weights load there, and
every method for its stages attaches here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from glocal.models.generation.image_layers import LevelEmbedding, sinusoids
from glocal.models.generation.image_unet_blocks import (
    GROUPS,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)


@dataclass(frozen=True)
class ImageUNetConfig:
    """Sizes of an `ImageUNet`, under the names of diffusers' configuration. attention_head_dim: heads of an attention
    (diffusers' name is an old mistake that its weights depend on).
    """

    in_channels: int = 12
    out_channels: int = 12
    block_out_channels: tuple[int, int, int] = (24, 24, 32)
    attention_head_dim: int = 4
    cross_attention_dim: int = 48
    norm_num_groups: int = GROUPS
    layers_per_block: int = 1


class ImageUNet(nn.Module):
    """Predicts clean latents from noisy ones.

    forward(sample [B, C, H, W], timestep [B] from 0 to 1000, encoder_hidden_states [B, L, text]) -> (latents of the
    same shape,). Any size runs: upsamplers take the size of the next skip.
    """

    def __init__(self, config: ImageUNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = ImageUNetConfig() if config is None else config
        if config.layers_per_block != 1 or config.norm_num_groups != GROUPS:
            raise ValueError(
                f"layers_per_block={config.layers_per_block}, norm_num_groups={config.norm_num_groups}: legal are 1 "
                f"and {GROUPS}"
            )
        heads, text = config.attention_head_dim, config.cross_attention_dim
        first, second, third = config.block_out_channels
        level = 4 * first
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = LevelEmbedding(first, level)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock2D(first, first, level, last=False),
                CrossAttnDownBlock2D(first, second, level, last=False, heads=heads, text=text),
                CrossAttnDownBlock2D(second, third, level, last=True, heads=heads, text=text),
            ]
        )
        self.mid_block = UNetMidBlock2DCrossAttn(third, level, heads, text)
        # A stage on the way up takes the last skips of the way down: its own stage's, and the one before it.
        self.up_blocks = nn.ModuleList(
            [
                CrossAttnUpBlock2D(third, (third, second), third, level, last=False, heads=heads, text=text),
                CrossAttnUpBlock2D(third, (second, first), second, level, last=False, heads=heads, text=text),
                UpBlock2D(second, (first, first), first, level, last=True),
            ]
        )
        self.conv_norm_out = nn.GroupNorm(GROUPS, first, eps=1e-5)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor]:
        """See the class; every word is looked at, encoder_attention_mask must be None."""
        if encoder_attention_mask is not None:
            raise ValueError("ImageUNet: encoder_attention_mask is given; legal: None, padding is a word of its own")
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample has shape {tuple(sample.shape)}; legal: [B, {self.config.in_channels}, H, W]")
        temb = self.time_embedding(sinusoids(timestep, self.config.block_out_channels[0]))  # [B, level]
        x = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (x,)
        for stage in self.down_blocks:
            x, made = stage(x, temb=temb, encoder_hidden_states=encoder_hidden_states)
            skips = (*skips, *made)
        x = self.mid_block(x, temb, encoder_hidden_states=encoder_hidden_states)
        for stage in self.up_blocks:
            taken, skips = skips[-2:], skips[:-2]
            size = tuple(skips[-1].shape[-2:]) if skips else None
            x = stage(
                hidden_states=x,
                res_hidden_states_tuple=taken,
                temb=temb,
                encoder_hidden_states=encoder_hidden_states,
                upsample_size=size,
            )
        return (self.conv_out(F.silu(self.conv_norm_out(x))),)
