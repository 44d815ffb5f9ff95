"""Host adapter of diffusers' CosmosTransformer3DModel (Cosmos-Predict 1 and 2; arXiv 2501.03575).

Self-attention: video tokens only, (frame, row, column) raster order. Cross attention: video queries, text keys.
Guidance is two calls. Predict 1, which adds learned positions, is told 0.25 log(sigma); Predict 2 is told
sigma / (1 + sigma), which is the noise level here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import torch

from glocal.adapt.hosts.diffusers.base import attention_of
from glocal.adapt.hosts.diffusers.gated import Gated, GatedHost, normed
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site
from glocal.canvas import Layout


class CosmosHost(GatedHost):
    """Sites are `transformer_blocks.N.attn1` (self) and `transformer_blocks.N.attn2` (cross)."""

    def gated(self, block: Any, site: Site) -> Gated | None:
        """Cross attention stays dense."""
        return normed("norm1", 1, lambda block: block.attn1.to_out[0].weight) if site.kind == "self" else None

    def sites(self, model: Any) -> Sequence[Site]:
        """Self and cross attention of every block, in the order they run."""
        found: list[Site] = []
        for layer in range(len(model.transformer_blocks)):
            block = f"transformer_blocks.{layer}"
            found.append(attention_of(model, f"{block}.attn1", layer, rotary="3-axis"))
            found.append(attention_of(model, f"{block}.attn2", layer, kind="cross"))
        return found

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, C, F, H, W]; encoder_hidden_states [B, L, C], or a pair of text and image."""
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        text = text[0] if isinstance(text, tuple) else text
        grid = tuple(n // p for n, p in zip(latents.shape[2:], model.config.patch_size, strict=True))
        told = float(torch.as_tensor(given["timestep"]).max())
        if model.config.extra_pos_embed_type == "learnable":
            sigma = exp(4 * told)
            told = sigma / (1 + sigma)
        return Forward(Layout.of(canvas_of(("video", grid))), told, latents, text, given["attention_mask"])


ADAPTER = CosmosHost()
