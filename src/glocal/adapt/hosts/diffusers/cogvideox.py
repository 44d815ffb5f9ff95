"""Host adapter of diffusers' CogVideoXTransformer3DModel (arXiv 2408.06072).

Joint attention over [text, video]; video tokens in (frame, row, column) raster order. The noise level is the timestep
as a share of the training schedule. The pipeline batches guidance: [without, with] in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from glocal.adapt.hosts.diffusers.gated import Gated, GatedHost, normed
from glocal.adapt.hosts.diffusers.reorder import Stream
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site
from glocal.canvas import Layout

SCHEDULE = 1000.0  # timesteps run from 999 (noise) to 0


class CogVideoXHost(GatedHost):
    """Sites are `transformer_blocks.N.attn1`."""

    def gated(self, block: Any, site: Site) -> Gated | None:
        """One norm serves media and text; the gate of the media stands third."""
        return normed("norm1", 2, lambda block: block.attn1.to_out[0].weight)

    def sites(self, model: Any) -> Sequence[Site]:
        """One joint attention a block."""
        heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
        rotary = "3-axis, video" if model.config.use_rotary_positional_embeddings else "none"
        return [
            Site(f"transformer_blocks.{layer}.attn1", layer, heads, dim, kind="joint", rotary=rotary)
            for layer in range(len(model.transformer_blocks))
        ]

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, F, C, H, W]; encoder_hidden_states [B, L, C]."""
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        frames, _, height, width = latents.shape[1:]
        side, deep = model.config.patch_size, model.config.patch_size_t
        grid = (frames if deep is None else -(-frames // deep), height // side, width // side)
        level = float(torch.as_tensor(given["timestep"]).max()) / SCHEDULE
        return Forward(Layout.of(canvas_of(("text", text.shape[1]), ("video", grid))), level, latents, text)

    def stream(self, model: Any) -> Stream | None:
        """The rotary table is an argument; positions that are added lie in the tokens already."""
        return Stream("transformer_blocks.0", "norm_final", rotary_argument="image_rotary_emb")


ADAPTER = CogVideoXHost()
