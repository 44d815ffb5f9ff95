"""Host adapter of diffusers' LTXVideoTransformer3DModel (arXiv 2501.00103).

Self-attention: video tokens only, given packed as [B, N, C] in (frame, row, column) raster order. Cross attention:
video queries, text keys, padded words masked. Where the caller does not say the grid, or adds tokens of a condition,
the tokens are a flat run.
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

SCHEDULE = 1000.0  # timesteps run from 1000 (noise) to 0

_GATED = Gated(
    lambda block, seen: block.scale_shift_table[2] + seen["temb"].unflatten(-1, (6, -1))[:, :, 2],
    lambda block: block.attn1.to_out[0].weight,
    ("hidden_states", "encoder_hidden_states", "temb"),
)


class LTXHost(GatedHost):
    """Sites are `transformer_blocks.N.attn1` (self) and `transformer_blocks.N.attn2` (cross)."""

    def gated(self, block: Any, site: Site) -> Gated | None:
        """Cross attention has no gate, and stays dense."""
        return _GATED if site.kind == "self" else None

    def sites(self, model: Any) -> Sequence[Site]:
        """Self and cross attention of every block, in the order they run."""
        found: list[Site] = []
        for layer in range(len(model.transformer_blocks)):
            block = f"transformer_blocks.{layer}"
            found.append(attention_of(model, f"{block}.attn1", layer, rotary="3-axis, all heads together"))
            found.append(attention_of(model, f"{block}.attn2", layer, kind="cross"))
        return found

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, N, C]; num_frames, height, width of the latents; encoder_attention_mask [B, L]."""
        tokens, text = given["hidden_states"], given["encoder_hidden_states"]
        said = tuple(given[name] for name in ("num_frames", "height", "width"))
        grid: tuple[int, ...] | int = tokens.shape[1]
        if None not in said:
            frames, height, width = (int(n) for n in said)
            grid = (frames, height, width) if frames * height * width == tokens.shape[1] else tokens.shape[1]
        level = float(torch.as_tensor(given["timestep"]).max()) / SCHEDULE
        mask = given["encoder_attention_mask"]
        mask = mask if mask is not None and mask.dim() == 2 else None
        return Forward(Layout.of(canvas_of(("video", grid))), level, tokens, text, mask)


ADAPTER = LTXHost()
