"""Host adapter of diffusers' SD3Transformer2DModel (arXiv 2403.03206).

Joint attention over [image, text]; image tokens in raster order, positions are added to them. Stable Diffusion 3.5 has
a second attention in some blocks, over the image alone. The pipeline batches guidance: [without, with] in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from glocal.adapt.hosts.diffusers.base import attention_of
from glocal.adapt.hosts.diffusers.gated import Gated, GatedHost, normed
from glocal.adapt.hosts.diffusers.intercept import NativeCall
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site
from glocal.canvas import Layout

SCHEDULE = 1000.0  # timesteps run from 1000 (noise) to 0


class SD3Host(GatedHost):
    """Sites are `transformer_blocks.N.attn` (joint) and `transformer_blocks.N.attn2` (self) where there is one."""

    text_first = False

    def gated(self, block: Any, site: Site) -> Gated | None:
        """The first norm serves both attentions; of the second, too, the stream in front of the block is told."""
        if site.kind == "joint":
            return normed("norm1", 1, lambda block: block.attn.to_out[0].weight)
        return normed("norm1", 6, lambda block: block.attn2.to_out[0].weight)

    def sites(self, model: Any) -> Sequence[Site]:
        """The attentions of every block, in the order they run."""
        found: list[Site] = []
        for layer, block in enumerate(model.transformer_blocks):
            found.append(attention_of(model, f"transformer_blocks.{layer}.attn", layer, kind="joint"))
            if getattr(block, "attn2", None) is not None:
                found.append(attention_of(model, f"transformer_blocks.{layer}.attn2", layer))
        return found

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, C, H, W]; encoder_hidden_states [B, L, C]."""
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        side = model.config.patch_size
        grid = (latents.shape[2] // side, latents.shape[3] // side)
        level = float(torch.as_tensor(given["timestep"]).max()) / SCHEDULE
        return Forward(Layout.of(canvas_of(("image", grid), ("text", text.shape[1]))), level, latents, text)

    def layout(self, model: Any, forward: Forward, site: Site, tokens: tuple[int, int], native: NativeCall) -> Layout:
        """The second attention has no text."""
        if site.kind == "joint":
            return forward.layout
        image = forward.layout.q.parts[0]
        return Layout.of(canvas_of(("image", image.shape), arrives=forward.layout.q.arrives))


ADAPTER = SD3Host()
