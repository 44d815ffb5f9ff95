"""Host adapter of diffusers' Flux2Transformer2DModel (FLUX.2 and its klein models).

As `flux`: joint attention over [text, image] in double and single blocks; position ids have four numbers, the first
three are image, row and column.
"""

from __future__ import annotations

from typing import Any

from glocal.adapt.hosts.diffusers.flux import FluxHost
from glocal.adapt.hosts.diffusers.joint import Gated
from glocal.adapt.hosts.diffusers.reorder import Stream


class Flux2Host(FluxHost):
    """Sites are `transformer_blocks.N.attn` and then `single_transformer_blocks.N.attn`."""

    def gated(self, block: Any) -> Gated | None:
        """Gates come from outside the blocks."""
        return None

    def stream(self, model: Any) -> Stream | None:
        """None: text and image leave the single blocks in one tensor."""
        return None


ADAPTER = Flux2Host()
