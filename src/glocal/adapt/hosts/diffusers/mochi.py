"""Host adapter of diffusers' MochiTransformer3DModel (Mochi 1).

Joint attention over [video, text], called once for each sample without its padded words: `SiteCall.row` says for which.
Video tokens in (frame, row, column) raster order. Timesteps rise from 0 (noise) to 1000; the pipeline batches guidance:
[without, with] in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from glocal.adapt.hosts.diffusers.base import DiffusersHost, attention_of
from glocal.adapt.hosts.diffusers.intercept import NativeCall
from glocal.adapt.hosts.diffusers.reorder import Stream
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site
from glocal.canvas import Layout

SCHEDULE = 1000.0


class MochiHost(DiffusersHost):
    """Sites are `transformer_blocks.N.attn1`."""

    by_sample = True

    def sites(self, model: Any) -> Sequence[Site]:
        """One joint attention a block."""
        names = [f"transformer_blocks.{layer}.attn1" for layer in range(len(model.transformer_blocks))]
        return [attention_of(model, n, i, kind="joint", rotary="3-axis, video") for i, n in enumerate(names)]

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, C, F, H, W]; encoder_attention_mask [B, L]."""
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        frames, height, width = latents.shape[2:]
        side = model.config.patch_size
        canvas = canvas_of(("video", (frames, height // side, width // side)), ("text", text.shape[1]))
        level = 1 - float(torch.as_tensor(given["timestep"]).min()) / SCHEDULE
        return Forward(Layout.of(canvas), level, latents, text)

    def layout(self, model: Any, forward: Forward, site: Site, tokens: tuple[int, int], native: NativeCall) -> Layout:
        """As many words as the sample has."""
        video = forward.layout.q.parts[0]
        words = tokens[1] - video.tokens
        return Layout.of(canvas_of(("video", video.shape), ("text", max(words, 0)), arrives=forward.layout.q.arrives))

    def stream(self, model: Any) -> Stream:
        """Rotary positions are learned, a table for each head."""
        return Stream("transformer_blocks.0", "norm_out", rotary="rope")


ADAPTER = MochiHost()
