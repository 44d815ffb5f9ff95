"""Put a method into a model and take it out again: ``handle = attach(model, method)``, ``handle.undo()``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from glocal.adapt.host import CoreFactory, HostAdapter, Point, Undo, host_of
from glocal.adapt.pipelines import count_steps, is_pipeline, name_expert, parts, watch_run, wrap_step
from glocal.adapt.records import Block, Core, RunState, Site, SiteCall
from glocal.canvas import Order


class Method:
    """Base of methods. A method defines the points it acts at; a host without such a point refuses it by name.

    Override any of `core`, `module`, `layer`, `forward`, `step`; what is not overridden is not touched. `order` belongs
    to the point "forward".
    """

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Which sites it wants; default all self-attention."""
        return tuple(s for s in sites if s.kind == "self")

    def blocks(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """At which other modules `module` acts too; default none."""
        return ()

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """In place of a site's attention: q, k, v [B, H, N, D] after norms and rotary -> [B, H, N, D]."""
        raise TypeError(f"{type(self).__name__} does not act at point 'core'.")

    def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
        """In place of the forward of an attention module, or of one of `blocks`."""
        raise TypeError(f"{type(self).__name__} does not act at point 'module'.")

    def layer(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        """In place of the forward of the layer around a site."""
        raise TypeError(f"{type(self).__name__} does not act at point 'layer'.")

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """In place of the model's forward."""
        raise TypeError(f"{type(self).__name__} does not act at point 'forward'.")

    def order(self, axes: tuple[int, ...]) -> Order | None:
        """In which order the tokens of a media grid run through all blocks; None leaves a forward alone.

        A host that cannot do it leaves the tokens as they lie: `Canvas.arrives` of a call says which it was.
        """
        raise TypeError(f"{type(self).__name__} gives no order.")

    def step(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """In place of the scheduler's step, on latents between forwards; pipelines have it."""
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
        for part in _parts(self.model).values():
            last = _OPEN[part][-1]
            if last is not self:
                raise RuntimeError(
                    f"Handle of {type(self.method).__name__} cannot be undone: {type(last.method).__name__} was "
                    "attached later to the same model and is still open; undo that one first."
                )
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        self.state.store.clear()
        for part in _parts(self.model).values():
            _OPEN[part].pop()

    def last(self, undo: Undo) -> None:
        """Something `undo` takes back last, because it was put in first."""
        self._undo.insert(0, undo)

    def stats(self) -> Mapping[str, Any]:
        """What the method counted, by site; empty for a method that counts nothing."""
        return dict(getattr(self.method, "stats", {}))

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


_OPEN: WeakKeyDictionary[Any, list[Handle]] = WeakKeyDictionary()


def attach(model: Any, method: Method, *, host: HostAdapter | None = None) -> Handle:
    """Put `method` into `model` and return the handle that takes it out.

    model: a model, or a pipeline of diffusers: then all its denoising models with one running state, which knows how
    many steps a run has. host: the adapter; None finds it by the class of the model.

    Nothing process-wide is touched; the same model may hold several methods (the one attached last acts first).
    Raises ValueError for an unknown model, a point the host does not offer, or no site the method wants.
    """
    pipe = model if is_pipeline(model) else None
    found = {name: (part, host_of(part) if host is None else host) for name, part in _parts(model).items()}
    for part, adapter in found.values():
        _offered(part, adapter, method, pipe is not None)
    state = RunState()
    undo: list[Undo] = []
    places = 0
    try:
        if pipe is not None:
            undo.append(watch_run(pipe, state))
        for name, (part, adapter) in found.items():
            if pipe is not None:
                undo.append(name_expert(part, name, state))
            undo.append(adapter.watch(part, state))
            if pipe is not None:
                undo.append(count_steps(pipe, part, state))
            places += _place(part, adapter, method, state, undo, None if pipe is None else name)
        if not places and set(method.points) & {"core", "module", "layer"}:
            raise ValueError(f"{type(method).__name__} found no attention site it wants in {type(model).__name__}.")
        if pipe is not None and "step" in method.points:
            undo.append(wrap_step(pipe, lambda original: method.step(original, state)))
    except BaseException:
        for back in reversed(undo):
            back()
        raise
    handle = Handle(model, method, undo, state)
    for part, _ in found.values():
        _OPEN.setdefault(part, []).append(handle)
    return handle


def _parts(model: Any) -> dict[str, Any]:
    """The models a handle sits in, by component name."""
    return dict(parts(model)) if is_pipeline(model) else {"": model}


def sites_of(model: Any) -> tuple[Site, ...]:
    """All attention sites of a model, or of the denoising models of a pipeline, each with its component."""
    if not is_pipeline(model):
        return tuple(host_of(model).sites(model))
    return tuple(
        replace(site, component=name) for name, part in parts(model).items() for site in host_of(part).sites(part)
    )


def media_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Self and joint attention over everything: no cross attention, no layers with a sliding window."""
    return tuple(s for s in sites if s.kind != "cross" and s.sliding_window is None)


def _offered(model: Any, host: HostAdapter, method: Method, piped: bool) -> None:
    """ValueError for a point the host does not offer."""
    offers = host.points | {"step"} if piped else host.points
    missing = [p for p in method.points if p not in offers]
    if missing:
        hint = " Attach to the pipeline for 'step'." if missing == ["step"] else ""
        raise ValueError(
            f"{type(method).__name__} acts at point {missing[0]!r}, which the host of {type(model).__name__} does not "
            f"offer; it offers {', '.join(sorted(offers))}.{hint}"
        )


def _place(
    model: Any, host: HostAdapter, method: Method, state: RunState, undo: list[Undo], component: str | None
) -> int:
    """Put the method into one model; how many places it took."""
    sites = tuple(host.sites(model))
    if component is not None:
        sites = tuple(replace(s, component=component) for s in sites)
    sites = method.sites(sites)
    if _orders(method) and hasattr(host, "reorder"):
        undo.append(host.reorder(model, state, method.order))  # type: ignore[attr-defined]
    for site in sites:
        if "core" in method.points:
            undo.append(host.wrap_core(model, site, state, _core_factory(method)))
        for point, make in (("module", method.module), ("layer", method.layer)):
            if point in method.points:
                undo.append(host.wrap(model, point, site.name, _site_wrapper(make, site, state)))  # type: ignore[arg-type]
    blocks: tuple[Block, ...] = ()
    if "module" in method.points and hasattr(host, "blocks"):
        blocks = tuple(host.blocks(model))  # type: ignore[attr-defined]
        blocks = blocks if component is None else tuple(replace(b, component=component) for b in blocks)
        blocks = method.blocks(blocks)
        for block in blocks:
            undo.append(host.wrap(model, "module", block.name, _site_wrapper(method.module, block, state)))
    if "forward" in method.points:
        undo.append(host.wrap(model, "forward", "", lambda original: method.forward(original, state)))
    return len(sites) + len(blocks)


def _orders(method: Method) -> bool:
    return type(method).order is not Method.order


def _core_factory(method: Method) -> CoreFactory:
    def factory(inner: Core) -> Core:
        def core(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            return method.core(q, k, v, call, inner)

        return core

    return factory


def _site_wrapper(
    make: Callable[[Callable[..., Any], Any, RunState], Callable[..., Any]], site: Site | Block, state: RunState
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda original: make(original, site, state)


def open_handles(model: Any) -> Mapping[str, Handle]:
    """The handles attached to `model`, by method name, oldest first."""
    return {type(h.method).__name__: h for part in _parts(model).values() for h in _OPEN.get(part, [])}
