"""Host adapter of diffusers' WanTransformer3DModel (Wan 2.1 and 2.2; arXiv 2503.20314).

Self-attention: video tokens only, (frame, row, column) raster order after patches of 1 x 2 x 2. Cross attention: video
queries, text keys; image-to-video calls attention a second time there, image keys first. Wan 2.2 has two such models
(experts): attach to the pipeline, and their steps count through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glocal.adapt.host import CoreFactory, Undo
from glocal.adapt.hosts.diffusers.base import DiffusersHost
from glocal.adapt.hosts.diffusers.reorder import Stream
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.adapt.records import RunState, Site, SiteCall
from glocal.canvas import Layout

SCHEDULE = 1000.0  # timesteps run from 1000 (noise) to 0

_RUNNING: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()  # block -> its stream and time


class WanHost(DiffusersHost):
    """Sites are `blocks.N.attn1` (self) and `blocks.N.attn2` (cross)."""

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

    def wrap_core(self, model: Any, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """As every host; while a block runs, its input and time embedding are kept for the record."""
        block = model.get_submodule(site.name.rpartition(".")[0])

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(zip(("hidden_states", "encoder_hidden_states", "temb"), args)) | kwargs
            _RUNNING[module] = (named["hidden_states"], named["temb"])

        def after(module: nn.Module, *_: Any) -> None:
            _RUNNING.pop(module, None)

        undo = super().wrap_core(model, site, state, core)
        hooks = (
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after, always_call=True),
        )

        def back() -> None:
            for hook in hooks:
                hook.remove()
            undo()

        return back

    def record(self, model: Any, call: SiteCall) -> SiteCall:
        """Self-attention adds ``gate * W_O out``; the gate is one a sample, so any rows can be asked for. Where tokens
        have noise levels of their own the gate differs by token and the contribution is not said.
        """
        block = model.get_submodule(call.site.name.rpartition(".")[0])
        if call.site.kind != "self" or block not in _RUNNING:
            return call
        stream, time = _RUNNING[block]
        if stream.shape[1] != call.layout.nq:
            return call
        if time.dim() != 3:
            return replace(call, residual=stream)
        gate = (block.scale_shift_table + time.float()).chunk(6, dim=1)[2]  # [B, 1, C]
        weight = block.attn1.to_out[0].weight
        if weight.is_meta:  # moved out of memory until its turn comes
            return replace(call, residual=stream)
        weight = weight.unflatten(1, (call.site.heads, call.site.head_dim))  # [C, H, D]

        def contribution(out: Tensor) -> Tensor:
            return torch.einsum("bhmd,chd->bhmc", out, weight.to(out.dtype)) * gate[:, None].to(out.dtype)

        return replace(call, residual=stream, contribution=contribution)


ADAPTER = WanHost()
