"""What the hosts of diffusers share: sites by module path, one record a forward, processors swapped and put back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glocal.adapt.host import CoreFactory, Point, Undo, wrap_forward
from glocal.adapt.hosts.diffusers.intercept import NativeCall, slot_of
from glocal.adapt.hosts.diffusers.reorder import Stream, reorder
from glocal.adapt.hosts.diffusers.running import Follower, Forward, canvas_of
from glocal.adapt.records import Block, Core, RunState, Site, SiteCall
from glocal.canvas import Layout, Order

_FORWARDS: WeakKeyDictionary[Any, Forward] = WeakKeyDictionary()
_ORDERED: WeakKeyDictionary[Any, Forward | None] = WeakKeyDictionary()  # of models whose tokens a method reorders


class DiffusersHost(ABC):
    """Base of the families. A site is named by the path of its attention module; its layer is the module around it."""

    points: frozenset[Point] = frozenset({"core", "module", "layer", "forward"})
    by_sample = False  # attention is called once for each sample of the batch

    @abstractmethod
    def sites(self, model: Any) -> Sequence[Site]:
        """The attention sites in the order they run."""

    @abstractmethod
    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """What the arguments of a forward, by name, say about it."""

    def blocks(self, model: Any) -> Sequence[Block]:
        """The transformer blocks, one for each layer of self or joint attention."""
        names = dict.fromkeys(s.name.rpartition(".")[0] for s in self.sites(model))
        return [Block(name, "layer", model.get_submodule(name)) for name in names]

    def stream(self, model: Any) -> Stream | None:
        """Where media tokens enter and leave the blocks; None where the host cannot take them in another order."""
        return None

    def layout(self, model: Any, forward: Forward, site: Site, tokens: tuple[int, int], native: NativeCall) -> Layout:
        """Where the tokens of one attention call lie; `tokens`: how many queries and keys it has."""
        return forward.layout if site.kind != "cross" else across(forward, tokens[1], native)

    def record(self, model: Any, call: SiteCall) -> SiteCall:
        """`call` with what else the host shows: the residual stream and what the heads add to it, where it can."""
        return call

    def watch(self, model: Any, state: RunState) -> Undo:
        """Read the arguments of every forward; distinct noise levels are steps (`Follower`)."""
        arguments = signature(type(model).forward)
        follower = Follower(state)

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = arguments.bind(module, *args, **kwargs)
            bound.apply_defaults()
            forward = self.read(module, bound.arguments)
            _FORWARDS[module] = forward
            follower.advance(forward)

        hook = model.register_forward_pre_hook(torch.compiler.disable(before), with_kwargs=True)

        def undo() -> None:
            hook.remove()
            _FORWARDS.pop(model, None)  # the next forward says it anew to whoever is still there

        return undo

    def reorder(self, model: Any, state: RunState, choose: Callable[[tuple[int, ...]], Order | None]) -> Undo:
        """Let media tokens run through all blocks in the order `choose(axes of their grid)` gives.

        Where the host cannot do that (`stream`) they stay as they lie; `Canvas.arrives` says so in every call.
        Raises ValueError if another method does it already.
        """
        stream = self.stream(model)
        if stream is None:
            return _nothing
        if model in _ORDERED:
            raise ValueError(
                f"{type(model).__name__}: another method has its tokens in an order of its own; undo that one first."
            )
        _ORDERED[model] = None

        def told(forward: Forward | None) -> None:
            _ORDERED[model] = forward
            if forward is not None:
                state.forward = forward

        undo = reorder(model, stream, choose, lambda: _FORWARDS[model], told)

        def back() -> None:
            undo()
            del _ORDERED[model]

        return back

    def wrap_core(self, model: Any, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """Put a core on top of what stands in the slot of the site's attention module."""
        module = model.get_submodule(site.name)

        def describe(q: Tensor, k: Tensor, native: NativeCall) -> SiteCall | None:
            if native.number > 0 and site.kind != "cross" and not self.by_sample:
                return None  # an adapter's extra attention to an image prompt
            tokens = (q.shape[2], k.shape[2])
            ordered = _ORDERED.get(model)
            layout = self.layout(model, _FORWARDS[model] if ordered is None else ordered, site, tokens, native)
            _check(site, layout, tokens, native)
            row = native.number if self.by_sample else None
            return self.record(model, SiteCall(site, layout, RunState(), native=native, row=row))

        slot = slot_of(module, describe)
        below = slot.core
        made: Core = core(below)

        def placed(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            return made(q, k, v, replace(call, site=site, state=state))

        # A compiled model would take the method's state, patterns and choices for constants of its graph.
        slot.core = torch.compiler.disable(placed)  # type: ignore[assignment]
        slot.enter(module)

        def undo() -> None:
            slot.core = below
            slot.leave(module)

        return undo

    wrap = staticmethod(wrap_forward)


def _nothing() -> None:
    """Nothing to take out."""


def across(forward: Forward, keys: int, native: NativeCall) -> Layout:
    """Media queries over words, or over what an image prompt adds; words that are masked see and are seen by nobody."""
    words = keys == forward.text.shape[1]
    queries, text = forward.layout.q, canvas_of(("text" if words else "image", keys))
    if native.mask is None or forward.text_mask is None or not words:
        return Layout(queries, text)
    hidden = torch.where(forward.text_mask.bool(), 0, -1).int()  # [B, L]
    return Layout(queries, text, documents=(hidden.new_zeros(hidden.shape[0], queries.size), hidden))


def attention_of(model: Any, name: str, layer: int, **more: Any) -> Site:
    """A site whose module says its number of heads (`heads`) and the width of all (`inner_dim`)."""
    module = model.get_submodule(name)
    return Site(name, layer, module.heads, module.inner_dim // module.heads, **more)


def _check(site: Site, layout: Layout, tokens: tuple[int, int], native: NativeCall) -> None:
    if tokens != (layout.nq, layout.nk):
        raise ValueError(
            f"site {site.name!r}: {tokens[0]} queries and {tokens[1]} keys arrive, but the arguments of the model say "
            f"{layout.nq} and {layout.nk}; legal: the whole sequence. Another method that drops or adds tokens, or "
            "context parallelism, does not go with point 'core'."
        )
    if native.mask is not None and not layout.lengths and layout.documents is None:
        raise ValueError(
            f"site {site.name!r}: an attention mask of shape {tuple(native.mask.shape)} arrives, which no layout of "
            "this host says; legal: None."
        )
