"""Host adapter of the built-in video diffusion transformer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from glocal.adapt.host import CoreFactory, Point, Undo, wrap_forward
from glocal.adapt.records import Block, Branch, Core, RunState, Site, SiteCall
from glocal.canvas import Canvas, Layout
from glocal.models.generation.video_dit import AttentionSite, VideoAttention, VideoDiT


class VideoDiTHost:
    """Sites are the `core` of each `VideoAttention`; tokens lie (T, H, W) in raster order, no text."""

    points: frozenset[Point] = frozenset({"core", "module", "layer", "forward"})

    def sites(self, model: VideoDiT) -> Sequence[Site]:
        """One self-attention a layer."""
        return [
            Site(name=f"blocks.{a.layer}.attn", layer=a.layer, heads=a.heads, head_dim=a.head_dim, rotary="3-axis")
            for a in model.sites()
        ]

    def blocks(self, model: VideoDiT) -> Sequence[Block]:
        """The transformer blocks."""
        return [Block(f"blocks.{layer}", "layer", block) for layer, block in enumerate(model.blocks)]

    def watch(self, model: VideoDiT, state: RunState) -> Undo:
        """Noise level and condition of every forward say where the run is (`RunState.advance`)."""

        def before(module: VideoDiT, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sigma = float((args[1] if len(args) > 1 else kwargs["sigma"]).flatten()[0])
            condition = args[2] if len(args) > 2 else kwargs.get("condition")
            clip = args[0] if args else kwargs["x"]
            branch: Branch = "uncond" if condition is None else "cond"
            state.advance(sigma, branch)
            state.rows = tuple((row, branch) for row in range(clip.shape[0]))

        return model.register_forward_pre_hook(before, with_kwargs=True).remove

    def wrap_core(self, model: VideoDiT, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """Replace the `core` attribute of the attention module."""
        module = model.get_submodule(site.name)
        assert isinstance(module, VideoAttention)
        had, original = "core" in module.__dict__, module.core

        def inner(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            return original(q, k, v, site=call.native)

        made: Core = core(inner)

        def replaced(q: Tensor, k: Tensor, v: Tensor, *, site: AttentionSite) -> Tensor:
            layout = Layout.of(_canvas(site.canvas))
            return made(q, k, v, SiteCall(here, layout, state, site.residual, site.contribution, site))

        here = site
        module.core = replaced  # type: ignore[assignment]

        def undo() -> None:
            if had:
                module.core = original
            else:
                del module.__dict__["core"]

        return undo

    wrap = staticmethod(wrap_forward)


@lru_cache(maxsize=64)
def _canvas(shape: tuple[int, int, int]) -> Canvas:
    return Canvas(shape)


ADAPTER = VideoDiTHost()
