"""Attention sites of private models: put `site` where the model calls scaled_dot_product_attention.

    out = glocal.adapt.site("blocks.3.attn", q, k, v, canvas=Canvas((16, 30, 40)))

It computes dense attention until a method is attached to the model that is running. `discover` runs the model once to
learn which sites it has; from then on `attach(model, method)` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from glocal.adapt.host import CoreFactory, Point, Undo, Wrapper, replace_forward
from glocal.adapt.records import Core, RunState, Site, SiteCall
from glocal.canvas import Canvas, Layout


@dataclass
class _Owner:
    """What is known of one private model, the cores that stand at its sites now, and the states (by id) for which a
    forward has begun and no site has been called yet.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    cores: dict[str, Core] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    learning: bool = False


_OWNERS: WeakKeyDictionary[Any, _Owner] = WeakKeyDictionary()
_RUNNING: ContextVar[_Owner | None] = ContextVar("glocal_running_model", default=None)


def site(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, canvas: Canvas | Layout, call: SiteCall | None = None
) -> Tensor:
    """Attention of a private model: dense, or what is attached to the model that is running.

    name: of the site, unique in its model. q [B, Hq, N, D], k and v [B, Hkv, N, D], after norms and rotary.
    canvas: where the tokens lie in this call. call: says more where a method should know more (a `Site` of kind
    "joint" or with a scale, the noise level in its state, the residual stream); its layout is replaced by `canvas`.
    Returns [B, Hq, N, D]. Raises ValueError for a soft-capped site, which no dense kernel here computes.
    """
    layout = Layout.of(canvas)
    owner = _RUNNING.get()
    if owner is not None and owner.learning and name not in owner.sites:
        known = Site(name, len(owner.sites), q.shape[1], q.shape[-1], kv_heads=k.shape[1])
        owner.sites[name] = known if call is None else replace(call.site, name=name)
    here = Site(name, 0, q.shape[1], q.shape[-1]) if call is None else call.site
    if owner is not None and name in owner.sites:
        here = owner.sites[name]
    base = SiteCall(here, layout, RunState()) if call is None else replace(call, site=here, layout=layout)
    core = _dense if owner is None else owner.cores.get(name, _dense)
    return core(q, k, v, base)


def discover(model: Any, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """Run ``model(*args, **kwargs)`` once without gradients and remember which sites it called, in their order.

    Raises ValueError if it called none.
    """
    owner = _OWNERS.get(model)
    owner = _Owner() if owner is None else owner
    token = _RUNNING.set(owner)
    owner.learning = True
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        owner.learning = False
        _RUNNING.reset(token)
    if not owner.sites:
        raise ValueError(
            f"{type(model).__name__} called no site in this run; put glocal.adapt.site(name, q, k, v, canvas=...) "
            "where it calls scaled_dot_product_attention."
        )
    _OWNERS[model] = owner
    return tuple(owner.sites.values())


def is_private(model: Any) -> bool:
    """Whether `discover` has seen this very model."""
    return model in _OWNERS


class PrivateHost:
    """Host of models that call `site`. Every forward is a run of its own unless the calls say a noise level."""

    points: frozenset[Point] = frozenset({"core", "forward"})

    def sites(self, model: Any) -> Sequence[Site]:
        """What `discover` saw."""
        return tuple(_OWNERS[model].sites.values())

    def watch(self, model: Any, state: RunState) -> Undo:
        """Say which model is running while it runs."""
        owner = _OWNERS[model]
        tokens: list[Token[_Owner | None]] = []

        def before(*_: Any) -> None:
            tokens.append(_RUNNING.set(owner))
            owner.begun.add(id(state))

        def after(*_: Any) -> None:
            _RUNNING.reset(tokens.pop())

        hooks = (model.register_forward_pre_hook(before), model.register_forward_hook(after, always_call=True))

        def undo() -> None:
            for hook in hooks:
                hook.remove()
            owner.begun.discard(id(state))

        return undo

    def wrap_core(self, model: Any, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """Put a core on top of what stands at the site."""
        owner = _OWNERS[model]
        original = owner.cores.get(site.name)
        made = core(_dense if original is None else original)

        def placed(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            if id(state) in owner.begun:  # the first site of a forward moves the state
                owner.begun.discard(id(state))
                _move(state, call.state)
            return made(q, k, v, replace(call, state=state))

        owner.cores[site.name] = placed

        def undo() -> None:
            if original is None:
                del owner.cores[site.name]
            else:
                owner.cores[site.name] = original

        return undo

    def wrap(self, model: Any, point: Point, name: str, wrapper: Callable[[Wrapper], Wrapper]) -> Undo:
        """Replace the forward of the model."""
        return replace_forward(model, wrapper)


def _move(state: RunState, told: RunState) -> None:
    if told.timestep is None:
        state.begin(told.total)
        state.step = 0
    else:
        state.total = told.total
        state.advance(told.timestep, told.branch)
    state.phase, state.rows, state.expert = told.phase, told.rows, told.expert


def _dense(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
    if call.site.softcap is not None:
        raise ValueError(
            f"site {call.site.name!r}: softcap={call.site.softcap} is nothing scaled_dot_product_attention computes; "
            "legal: None. Write a host adapter (glocal.adapt.register_host) that calls the model's own kernel."
        )
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=call.site.causal, scale=call.site.scale, enable_gqa=grouped)


ADAPTER = PrivateHost()
