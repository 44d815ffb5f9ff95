"""What the hosts of diffusers share: sites by module path, one record a forward, processors swapped and put back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from glocal.adapt.host import CoreFactory, Point, Undo, Wrapper, replace_forward
from glocal.adapt.hosts.diffusers.intercept import NativeCall, slot_of
from glocal.adapt.hosts.diffusers.running import Follower, Forward
from glocal.adapt.records import Core, RunState, Site, SiteCall
from glocal.canvas import Layout

_FORWARDS: WeakKeyDictionary[Any, Forward] = WeakKeyDictionary()


class DiffusersHost(ABC):
    """Base of the families. A site is named by the path of its attention module; its layer is the module around it."""

    points: frozenset[Point] = frozenset({"core", "module", "layer", "forward"})

    @abstractmethod
    def sites(self, model: Any) -> Sequence[Site]:
        """The attention sites in the order they run."""

    @abstractmethod
    def read(self, model: Any, given: dict[str, Any]) -> Forward:
        """What the arguments of a forward, by name, say about it."""

    def layout(self, forward: Forward, site: Site, keys: int, native: NativeCall) -> Layout:
        """Where the tokens of one attention call lie; `keys`: how many keys it has."""
        return forward.layout

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

        hook = model.register_forward_pre_hook(before, with_kwargs=True)

        def undo() -> None:
            hook.remove()
            _FORWARDS.pop(model, None)  # the next forward says it anew to whoever is still there

        return undo

    def wrap_core(self, model: Any, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """Put a core on top of what stands in the slot of the site's attention module."""
        module = model.get_submodule(site.name)

        def describe(q: Tensor, k: Tensor, native: NativeCall) -> SiteCall | None:
            if native.number > 0 and site.kind != "cross":
                return None  # an adapter's extra attention to an image prompt
            layout = self.layout(_FORWARDS[model], site, k.shape[2], native)
            _check(site, layout, q.shape[2], k.shape[2], native)
            return self.record(model, SiteCall(site, layout, RunState(), native=native))

        slot = slot_of(module, describe)
        below = slot.core
        made: Core = core(below)

        def placed(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            return made(q, k, v, replace(call, state=state))

        slot.core = placed
        slot.enter(module)

        def undo() -> None:
            slot.core = below
            slot.leave(module)

        return undo

    def wrap(self, model: Any, point: Point, name: str, wrapper: Wrapper) -> Undo:
        """Replace the forward of an attention module, of the block that holds it, or of the model."""
        if point == "forward":
            return replace_forward(model, wrapper)
        return replace_forward(model.get_submodule(name if point == "module" else name.rpartition(".")[0]), wrapper)


def _check(site: Site, layout: Layout, queries: int, keys: int, native: NativeCall) -> None:
    if (queries, keys) != (layout.nq, layout.nk):
        raise ValueError(
            f"site {site.name!r}: {queries} queries and {keys} keys arrive, but the arguments of the model say "
            f"{layout.nq} and {layout.nk}; legal: the whole sequence. Another method that drops or adds tokens, or "
            "context parallelism, does not go with point 'core'."
        )
    if native.mask is not None and not layout.lengths:
        raise ValueError(
            f"site {site.name!r}: an attention mask of shape {tuple(native.mask.shape)} arrives, which no layout of "
            "this host says; legal: None."
        )
