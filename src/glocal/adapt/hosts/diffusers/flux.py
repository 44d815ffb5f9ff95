"""Host adapter of diffusers' FluxTransformer2DModel.

Joint attention over [text, image] in double and single blocks. Image tokens are 2 x 2 patches, packed by the pipeline,
in raster order; their grid is read from the position ids. A reference image, whose ids begin with another number, is a
grid of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.hosts.diffusers.gated import JointHost
from glocal.adapt.hosts.diffusers.reorder import Stream
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Site
from glocal.canvas import Layout


class FluxHost(JointHost):
    """Sites are `transformer_blocks.N.attn` and then `single_transformer_blocks.N.attn`."""

    def sites(self, model: Any) -> Sequence[Site]:
        """One joint attention a block; layers count through both kinds of block."""
        names = [f"transformer_blocks.{n}.attn" for n in range(len(model.transformer_blocks))]
        names += [f"single_transformer_blocks.{n}.attn" for n in range(len(model.single_transformer_blocks))]
        heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
        return [Site(n, layer, heads, dim, kind="joint", rotary="3-axis") for layer, n in enumerate(names)]

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """hidden_states [B, N, C]; img_ids [N, 3] (or [B, N, 3]): image, row, column; timestep in [0, 1]."""
        text = given["encoder_hidden_states"]
        ids = given["img_ids"]
        images = image_grids(ids[0] if ids.dim() == 3 else ids)
        names = ["image", *(f"reference_{n}" for n in range(1, len(images)))]
        canvas = canvas_of(("text", text.shape[1]), *zip(names, images, strict=True))
        return Forward(Layout.of(canvas), float(given["timestep"].max()), given["hidden_states"], text)

    def stream(self, model: Any) -> Stream:
        """What a ControlNet adds between blocks goes along."""
        added = ("controlnet_block_samples", "controlnet_single_block_samples")
        return Stream("transformer_blocks.0", "norm_out", rotary="pos_embed", text_first=True, arguments=added)


def image_grids(ids: Tensor) -> list[tuple[int, int] | int]:
    """Position ids [N, 3 or more] -> rows and columns of each image in turn; their number where they are no raster."""
    ids = ids.detach().cpu().long()
    found: list[tuple[int, int] | int] = []
    _, counts = torch.unique_consecutive(ids[:, 0], return_counts=True)
    for one in ids.split(counts.tolist()):
        row, column = (one[:, 1:3] - one[:, 1:3].amin(0)).unbind(1)
        rows, columns = int(row.max()) + 1, int(column.max()) + 1
        raster = one.shape[0] == rows * columns and torch.equal(row * columns + column, torch.arange(one.shape[0]))
        found.append((rows, columns) if raster else one.shape[0])
    return found


ADAPTER = FluxHost()
