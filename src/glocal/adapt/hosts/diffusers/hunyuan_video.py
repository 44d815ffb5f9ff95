"""Host adapter of diffusers' HunyuanVideoTransformer3DModel (arXiv 2412.03603).

Joint attention over [video, text] in double and single blocks; video tokens in (frame, row, column) raster order, text
last and padded at its end. The text refiner in front of the blocks has attention of its own and is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from glocal.adapt.hosts.diffusers.gated import JointHost
from glocal.adapt.hosts.diffusers.reorder import Stream
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site
from glocal.canvas import Layout

SCHEDULE = 1000.0  # timesteps run from 1000 (noise) to 0


class HunyuanVideoHost(JointHost):
    """Sites are `transformer_blocks.N.attn` and then `single_transformer_blocks.N.attn`."""

    text_first = False

    def sites(self, model: Any) -> Sequence[Site]:
        """One joint attention a block; layers count through both kinds of block."""
        names = [f"transformer_blocks.{n}.attn" for n in range(len(model.transformer_blocks))]
        names += [f"single_transformer_blocks.{n}.attn" for n in range(len(model.single_transformer_blocks))]
        heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
        return [Site(n, layer, heads, dim, kind="joint", rotary="3-axis, video") for layer, n in enumerate(names)]

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, C, F, H, W]; encoder_attention_mask [B, L], ones for the valid text."""
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        config = model.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        grid = tuple(n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        canvas = canvas_of(("video", grid), ("text", text.shape[1]))
        lengths = given["encoder_attention_mask"].sum(1, dtype=torch.int32)  # [B]
        level = float(given["timestep"].max()) / SCHEDULE
        return Forward(Layout(canvas, canvas, lengths={"text": lengths}), level, latents, text)

    def stream(self, model: Any) -> Stream | None:
        """A model that conditions on the first frame by its place in the sequence needs the raster."""
        if model.config.image_condition_type == "token_replace":
            return None
        return Stream("transformer_blocks.0", "norm_out", rotary="rope")


ADAPTER = HunyuanVideoHost()
