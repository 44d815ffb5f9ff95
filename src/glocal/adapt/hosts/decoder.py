"""Host adapter of the built-in decoder over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from glocal.adapt.host import CoreFactory, Point, Undo, wrap_forward
from glocal.adapt.records import Core, RunState, Site, SiteCall
from glocal.canvas import Canvas, Layout
from glocal.models.language import Decoder, DecoderAttention, DecoderSite


class DecoderHost:
    """Sites are the `core` of each `DecoderAttention`; every forward is a prefill of the whole text."""

    points: frozenset[Point] = frozenset({"core", "module", "layer", "forward"})

    def sites(self, model: Decoder) -> Sequence[Site]:
        """One causal self-attention a layer."""
        return [
            Site(
                f"blocks.{a.layer}.attn",
                a.layer,
                a.heads,
                a.head_dim,
                component="text_model",
                kv_heads=a.kv_heads,
                causal=True,
                rotary="1-axis",
            )
            for a in model.sites()
        ]

    def watch(self, model: Decoder, state: RunState) -> Undo:
        """Every forward is a run of one step."""

        def before(module: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs["ids"]
            state.begin(1)
            state.step, state.phase = 0, "prefill"
            state.rows = tuple((row, "both") for row in range(ids.shape[0]))

        return model.register_forward_pre_hook(before, with_kwargs=True).remove

    def wrap_core(self, model: Decoder, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """Replace the `core` attribute of the attention module."""
        module = model.get_submodule(site.name)
        assert isinstance(module, DecoderAttention)
        had, original = "core" in module.__dict__, module.core

        def inner(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            return original(q, k, v, site=call.native)

        made: Core = core(inner)

        def replaced(q: Tensor, k: Tensor, v: Tensor, *, site: DecoderSite) -> Tensor:
            layout = Layout.of(Canvas((q.shape[2],)))
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


ADAPTER = DecoderHost()
