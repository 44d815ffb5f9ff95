"""Host adapter of diffusers' UNet2DConditionModel (Stable Diffusion 1.5, 2 and XL; arXiv 2112.10752, 2307.01952).

Self-attention over the pixels of a level in raster order, cross attention from them to the words. The grid of a level
is read where its transformer runs, so odd sizes, and methods that change them on the way, are told truly. Blocks of
other kinds (`blocks`) are the stages, residual blocks, down- and upsamplers. The pipeline batches guidance: [without,
with] in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from glocal.adapt.host import Undo
from glocal.adapt.hosts.diffusers.base import DiffusersHost, across, attention_of
from glocal.adapt.hosts.diffusers.intercept import NativeCall
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import Block, RunState, Site
from glocal.canvas import Layout

SCHEDULE = 1000.0  # timesteps run from 999 (noise) to 0

_GRIDS: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()  # transformer of a level -> its pixels


class UNetHost(DiffusersHost):
    """Sites are `....attentions.N.transformer_blocks.M.attn1` (self) and `.attn2` (cross); layers count transformer
    blocks from the input to the output.
    """

    def sites(self, model: Any) -> Sequence[Site]:
        """Self and cross attention of every transformer block, in the order they run."""
        found: list[Site] = []
        for layer, block in enumerate(_layers(model)):
            found.append(attention_of(model, f"{block}.attn1", layer, component="unet"))
            if getattr(model.get_submodule(block), "attn2", None) is not None:
                found.append(attention_of(model, f"{block}.attn2", layer, kind="cross", component="unet"))
        return found

    def blocks(self, model: Any) -> Sequence[Block]:
        """Stages ("down", "mid", "up"), in them "resnet", "transformer" (the layers between two resnets),
        "downsampler", "upsampler", and every "layer".
        """
        found: list[Block] = []
        for role, name, stage in _stages(model):
            found.append(Block(name, role, stage, "unet"))
            for of in ("resnet", "downsampler", "upsampler"):
                inside = getattr(stage, f"{of}s", None)
                for n, module in enumerate(() if inside is None else inside):
                    found.append(Block(f"{name}.{of}s.{n}", of, module, "unet"))
        held = dict.fromkeys(name.rpartition(".transformer_blocks.")[0] for name in _layers(model))
        found += [Block(name, "transformer", model.get_submodule(name), "unet") for name in held]
        found += [Block(name, "layer", model.get_submodule(name), "unet") for name in _layers(model)]
        return found

    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """sample [B, C, H, W]; encoder_hidden_states [B, L, C]."""
        latents, text = given["sample"], given["encoder_hidden_states"]
        level = float(torch.as_tensor(given["timestep"]).max()) / SCHEDULE
        mask = given["encoder_attention_mask"]
        return Forward(Layout.of(canvas_of(("image", tuple(latents.shape[2:])))), level, latents, text, mask)

    def watch(self, model: Any, state: RunState) -> Undo:
        """As every host; each level says its size when it runs."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            _GRIDS[module] = tuple(x.shape[-2:])

        undo = super().watch(model, state)
        paths = {name.rpartition(".transformer_blocks.")[0] for name in _layers(model)}
        hooks = [model.get_submodule(p).register_forward_pre_hook(before, with_kwargs=True) for p in sorted(paths)]

        def back() -> None:
            for hook in hooks:
                hook.remove()
            undo()

        return back

    def layout(self, model: Any, forward: Forward, site: Site, tokens: tuple[int, int], native: NativeCall) -> Layout:
        """Pixels of the level; a part of them (windows folded into the batch) is a flat run."""
        grid = _GRIDS[model.get_submodule(site.name.rpartition(".transformer_blocks.")[0])]
        whole = grid[0] * grid[1] == tokens[0]
        pixels = Layout.of(canvas_of(("image", grid if whole else tokens[0])))
        if site.kind == "self":
            return pixels
        return across(replace(forward, layout=pixels), tokens[1], native)


def _stages(model: Any) -> list[tuple[str, str, nn.Module]]:
    """Role, path and module of every stage, in the order they run."""
    found = [("down", f"down_blocks.{n}", block) for n, block in enumerate(model.down_blocks)]
    if model.mid_block is not None:
        found.append(("mid", "mid_block", model.mid_block))
    return found + [("up", f"up_blocks.{n}", block) for n, block in enumerate(model.up_blocks)]


def _layers(model: Any) -> list[str]:
    """Paths of the transformer blocks, in the order they run."""
    found: list[str] = []
    for _, name, stage in _stages(model):
        for n, attention in enumerate(getattr(stage, "attentions", ())):
            blocks = getattr(attention, "transformer_blocks", ())
            found += [f"{name}.attentions.{n}.transformer_blocks.{m}" for m in range(len(blocks))]
    return found


ADAPTER = UNetHost()
