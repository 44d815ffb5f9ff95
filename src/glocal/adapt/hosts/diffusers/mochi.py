"""Host adapter of diffusers' MochiTransformer3DModel (Mochi 1).

Joint attention over [video, text], called once for each sample without its padded words: `SiteCall.row` says for which.
Video tokens in (frame, row, column) raster order. Timesteps rise from 0 (noise) to 1000; the pipeline batches guidance:
[without, with] in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.adapt.hosts.diffusers.base import attention_of
from glocal.adapt.hosts.diffusers.gated import Gated, GatedHost, Seen
from glocal.adapt.hosts.diffusers.intercept import NativeCall
from glocal.adapt.hosts.diffusers.reorder import Stream
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site, SiteCall
from glocal.canvas import Layout

SCHEDULE = 1000.0


class MochiHost(GatedHost):
    """Sites are `transformer_blocks.N.attn1`."""

    by_sample = True

    def gated(self, block: Any, site: Site) -> Gated | None:
        """The gate acts through its hyperbolic tangent, behind a norm of what attention adds (`record`)."""
        return Gated(
            lambda block, seen: torch.tanh(seen["norm"][1]), lambda block: block.attn1.to_out[0].weight, norm="norm1"
        )

    def entered(self, seen: Seen, call: SiteCall) -> Tensor:
        """Of the sample that the call serves. The stream of words has another width: ones stand for it."""
        media = seen["hidden_states"] if call.row is None else seen["hidden_states"][call.row : call.row + 1]
        return F.pad(media, (0, 0, 0, max(call.layout.nq - media.shape[1], 0)), value=1.0)

    def record(self, model: Any, call: SiteCall) -> SiteCall:
        """What attention adds is brought to a root mean square of one before the gate."""
        call = super().record(model, call)
        if call.contribution is None:
            return call
        block = model.get_submodule(call.site.name.rpartition(".")[0])

        def factor(out: Tensor) -> Tensor:
            added = block.attn1.to_out[0](out.transpose(1, 2).flatten(2))  # [B, M, C]
            return (added.float().square().mean(-1) + block.norm2.norm.eps).rsqrt()

        return replace(call, factor=factor)

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
