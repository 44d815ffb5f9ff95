"""Host adapter of diffusers' Flux2Transformer2DModel (FLUX.2 and its klein models).

As `flux`: joint attention over [text, image] in double and single blocks; position ids have four numbers, the first
three are image, row and column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from glocal.adapt.hosts.diffusers.flux import FluxHost
from glocal.adapt.hosts.diffusers.gated import Gated, Seen
from glocal.adapt.hosts.diffusers.reorder import Stream
from glocal.adapt.records import Site


class Flux2Host(FluxHost):
    """Sites are `transformer_blocks.N.attn` and then `single_transformer_blocks.N.attn`."""

    def gated(self, block: Any, site: Site) -> Gated | None:
        """Shift, scale and gate of all blocks of a kind come from outside, one behind the other."""
        stream = ("hidden_states", "encoder_hidden_states")
        if hasattr(block, "norm1"):
            return Gated(_third_of("temb_mod_img", 6), lambda b: b.attn.to_out[0].weight, (*stream, "temb_mod_img"))
        return Gated(_third_of("temb_mod", 3), lambda b: b.attn.to_out.weight, (*stream, "temb_mod"))

    def stream(self, model: Any) -> Stream | None:
        """None: text and image leave the single blocks in one tensor."""
        return None


def _third_of(name: str, parts: int) -> Callable[[Any, Seen], Tensor]:
    """The gate of attention among the modulations in an argument of the block."""
    return lambda _, seen: seen[name].chunk(parts, dim=-1)[2]


ADAPTER = Flux2Host()
