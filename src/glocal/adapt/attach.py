"""Put a method into a model and take it out again: ``handle = attach(model, method)``, ``handle.undo()``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from glocal.adapt.host import CoreFactory, HostAdapter, Point, Undo, host_of
from glocal.adapt.records import Core, RunState, Site, SiteCall


class Method:
    """Base of methods. A method defines the points it acts at; a host without such a point refuses it by name.

    Override any of `core`, `module`, `layer`, `forward`, `step`; what is not overridden is not touched.
    """

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Which sites it wants; default all self-attention."""
        return tuple(s for s in sites if s.kind == "self")

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """In place of a site's attention: q, k, v [B, H, N, D] after norms and rotary -> [B, H, N, D]."""
        raise TypeError(f"{type(self).__name__} does not act at point 'core'.")

    def module(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        """In place of an attention module's forward."""
        raise TypeError(f"{type(self).__name__} does not act at point 'module'.")

    def layer(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        """In place of the forward of the layer around a site."""
        raise TypeError(f"{type(self).__name__} does not act at point 'layer'.")

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """In place of the model's forward."""
        raise TypeError(f"{type(self).__name__} does not act at point 'forward'.")

    def step(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """Between forwards, on latents or logits."""
        raise TypeError(f"{type(self).__name__} does not act at point 'step'.")

    @property
    def points(self) -> tuple[Point, ...]:
        """The points this method acts at."""
        every: tuple[Point, ...] = ("core", "module", "layer", "forward", "step")
        return tuple(p for p in every if getattr(type(self), p) is not getattr(Method, p))


class Handle:
    """An attached method. A context manager; `undo` restores the originals bit for bit."""

    def __init__(self, model: Any, method: Method, undo: list[Undo], state: RunState) -> None:
        self.model, self.method, self.state = model, method, state
        self._undo = undo

    @property
    def attached(self) -> bool:
        """Whether the method is still in the model."""
        return bool(self._undo)

    def undo(self) -> None:
        """Take the method out. RuntimeError if a handle attached later is still open (undo that one first)."""
        if not self._undo:
            return
        stack = _OPEN[self.model]
        if stack[-1] is not self:
            raise RuntimeError(
                f"Handle of {type(self.method).__name__} cannot be undone: {type(stack[-1].method).__name__} was "
                "attached later to the same model and is still open; undo that one first."
            )
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        self.state.store.clear()
        stack.pop()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


_OPEN: WeakKeyDictionary[Any, list[Handle]] = WeakKeyDictionary()


def attach(model: Any, method: Method, *, host: HostAdapter | None = None) -> Handle:
    """Put `method` into `model` and return the handle that takes it out.

    Nothing process-wide is touched; the same model may hold several methods (the one attached last acts first).
    Raises ValueError for an unknown model, a point the host does not offer, or no site the method wants.
    """
    host = host_of(model) if host is None else host
    missing = [p for p in method.points if p not in host.points]
    if missing:
        raise ValueError(
            f"{type(method).__name__} acts at point {missing[0]!r}, which the host of {type(model).__name__} does not "
            f"offer; it offers {', '.join(sorted(host.points))}."
        )
    sites = method.sites(tuple(host.sites(model)))
    if not sites and set(method.points) & {"core", "module", "layer"}:
        raise ValueError(f"{type(method).__name__} found no attention site it wants in {type(model).__name__}.")
    state = RunState()
    undo: list[Undo] = []
    try:
        undo.append(host.watch(model, state))
        for site in sites:
            if "core" in method.points:
                undo.append(host.wrap_core(model, site, state, _core_factory(method)))
            for point, make in (("module", method.module), ("layer", method.layer)):
                if point in method.points:
                    undo.append(host.wrap(model, point, site.name, _site_wrapper(make, site, state)))  # type: ignore[arg-type]
        for point, whole in (("forward", method.forward), ("step", method.step)):
            if point in method.points:
                undo.append(host.wrap(model, point, "", lambda f, whole=whole: whole(f, state)))  # type: ignore[arg-type]
    except BaseException:
        for back in reversed(undo):
            back()
        raise
    handle = Handle(model, method, undo, state)
    _OPEN.setdefault(model, []).append(handle)
    return handle


def _core_factory(method: Method) -> CoreFactory:
    def factory(inner: Core) -> Core:
        def core(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            return method.core(q, k, v, call, inner)

        return core

    return factory


def _site_wrapper(
    make: Callable[[Callable[..., Any], Site, RunState], Callable[..., Any]], site: Site, state: RunState
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda original: make(original, site, state)


def open_handles(model: Any) -> Mapping[str, Handle]:
    """The handles attached to `model`, by method name, oldest first."""
    return {type(h.method).__name__: h for h in _OPEN.get(model, [])}
