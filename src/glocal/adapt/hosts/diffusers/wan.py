"""Host adapter of diffusers' WanTransformer3DModel (Wan 2.1 and 2.2; arXiv 2503.20314).

Self-attention: video tokens only, (frame, row, column) raster order after patches of 1 x 2 x 2. Cross attention: video
queries, text keys; image-to-video calls attention a second time there, image keys first. Wan 2.2 has two such models
(experts): attach to the pipeline, and their steps count through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glocal.adapt.hosts.diffusers.gated import Gated, GatedHost
from glocal.adapt.hosts.diffusers.reorder import Stream
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site
from glocal.canvas import Layout

SCHEDULE = 1000.0  # timesteps run from 1000 (noise) to 0

_GATED = Gated(
    lambda block, seen: (block.scale_shift_table + seen["temb"].float()).chunk(6, dim=-2)[2].squeeze(-2),
    lambda block: block.attn1.to_out[0].weight,
    ("hidden_states", "encoder_hidden_states", "temb"),
)


class WanHost(GatedHost):
    """Sites are `blocks.N.attn1` (self) and `blocks.N.attn2` (cross)."""

    def gated(self, block: Any, site: Site) -> Gated | None:
        """Cross attention has no gate, and stays dense."""
        return _GATED if site.kind == "self" else None

    def sites(self, model: Any) -> Sequence[Site]:
        """Self and cross attention of every block, in the order they run."""
        heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
        found: list[Site] = []
        for layer in range(len(model.blocks)):
            found.append(Site(f"blocks.{layer}.attn1", layer, heads, dim, rotary="3-axis"))
            found.append(Site(f"blocks.{layer}.attn2", layer, heads, dim, kind="cross"))
        return found

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, C, F, H, W]; timestep [B], or [B, N] where tokens have levels of their own."""
        latents = given["hidden_states"]
        grid = tuple(n // p for n, p in zip(latents.shape[2:], model.config.patch_size, strict=True))
        level = float(given["timestep"].max()) / SCHEDULE  # frames that are given (level 0) do not count
        return Forward(Layout.of(canvas_of(("video", grid))), level, latents, given["encoder_hidden_states"])

    def stream(self, model: Any) -> Stream:
        """Tokens with noise levels of their own carry them along."""
        return Stream("blocks.0", "norm_out", rotary="rope", axis=1, levels="blocks")


ADAPTER = WanHost()
