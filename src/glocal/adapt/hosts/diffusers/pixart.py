"""Host adapter of diffusers' PixArtTransformer2DModel (PixArt-alpha, arXiv 2310.00426, and PixArt-Sigma).

Self-attention: image tokens only, in raster order, positions are added to them. Cross attention: image queries, text
keys, padded words masked. The pipeline batches guidance: [without, with] in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from glocal.adapt.hosts.diffusers.base import attention_of
from glocal.adapt.hosts.diffusers.gated import Gated, GatedHost
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site
from glocal.canvas import Layout

SCHEDULE = 1000.0  # timesteps run from 999 (noise) to 0

_GATED = Gated(
    lambda block, seen: block.scale_shift_table[2] + seen["timestep"].unflatten(-1, (6, -1))[:, 2],
    lambda block: block.attn1.to_out[0].weight,
)


class PixArtHost(GatedHost):
    """Sites are `transformer_blocks.N.attn1` (self) and `transformer_blocks.N.attn2` (cross)."""

    def gated(self, block: Any, site: Site) -> Gated | None:
        """Cross attention has no gate, and stays dense."""
        return _GATED if site.kind == "self" else None

    def sites(self, model: Any) -> Sequence[Site]:
        """Self and cross attention of every block, in the order they run."""
        found: list[Site] = []
        for layer in range(len(model.transformer_blocks)):
            block = f"transformer_blocks.{layer}"
            found.append(attention_of(model, f"{block}.attn1", layer))
            found.append(attention_of(model, f"{block}.attn2", layer, kind="cross"))
        return found

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, C, H, W]; encoder_hidden_states [B, L, C]; encoder_attention_mask [B, L]."""
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        side = model.config.patch_size
        grid = (latents.shape[2] // side, latents.shape[3] // side)
        level = float(torch.as_tensor(given["timestep"]).max()) / SCHEDULE
        mask = given["encoder_attention_mask"]
        mask = mask if mask is not None and mask.dim() == 2 else None
        return Forward(Layout.of(canvas_of(("image", grid))), level, latents, text, mask)


ADAPTER = PixArtHost()
