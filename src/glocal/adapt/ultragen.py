"""UltraGen (arXiv 2510.18775): video far above the trained resolution, `ultragen(pipe, parts=...)`, `handle.undo()`.

Self-attention of every block is replaced by windows of two levels and a compressed global branch, mixed by gates that
read the noise level (`glocal.nn.ultragen`). The trained parts lie beside the model (`UltraGenParts`), whose own weights
do not change; fresh parts run too, but the paper's quality belongs to trained ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glocal._errors import check_choice
from glocal.adapt.attach import Handle, Method, attach, sites_of
from glocal.adapt.presets import Preset, changed_in
from glocal.adapt.records import Block, RunState, Site
from glocal.adapt.ultragen_hosts import host_of
from glocal.adapt.ultragen_parts import UltraGenParts, models_of
from glocal.nn.lora import LowRank
from glocal.nn.ultragen import UltraGenSettings

__all__ = ["PRESETS", "UltraGen", "UltraGenParts", "UltraGenSettings", "ultragen"]

PRESETS: Mapping[str, Preset[UltraGenSettings]] = {
    "wan2.1-1.3b": Preset(
        UltraGenSettings(), ("WanTransformer3DModel",), "arXiv 2510.18775; strides from its speed-up"
    ),
}


class UltraGen(Method):
    """The method in the models of `parts`. last: level and grid of the forward that runs, or ran last."""

    def __init__(self, models: Mapping[str, nn.Module], parts: UltraGenParts, *, backend: str = "auto") -> None:
        self.models, self.parts, self.backend = dict(models), parts, backend
        self.last: tuple[Tensor, tuple[int, int, int]] | None = None

    @property
    def settings(self) -> UltraGenSettings:
        """Those of the parts."""
        return self.parts.settings

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """The model; its noise level and grid are noted for the attention inside."""
        model: Any = getattr(original, "__self__", None)
        model = next(iter(self.models.values())) if model is None else model
        host, arguments = host_of(model), signature(type(model).forward)

        @wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            given = arguments.bind(model, *args, **kwargs).arguments
            layout = None if state.forward is None else state.forward.layout
            if layout is not None and layout.q.arrives != "raster":
                raise ValueError(
                    f"ultragen: tokens arrive in the order {layout.q.arrives!r}; legal: raster. Another method "
                    "reorders them: undo that one first."
                )
            # Kept when the forward is over: gradient checkpointing runs the blocks again behind it.
            self.last = host.level(model, given), host.axes(model, given)
            return original(*args, **kwargs)

        # The grid is no constant of a compiled graph; the model below is compiled all the same.
        return torch.compiler.disable(run, recursive=False)

    def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
        """In place of a self-attention."""
        model = self.models[site.component if len(self.models) > 1 else next(iter(self.models))]
        host, module = host_of(model), model.get_submodule(site.name)
        ends, mine = host.ends(module), self.parts.attention(site.component, site.name)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            x, axes, rotary = host.call(args, kwargs)
            assert self.last is not None
            level = self.last[0].to(x.device)
            level = level.expand(x.shape[0]) if level.dim() < 2 else level
            return mine(x, self.last[1] if axes is None else axes, level, ends, rotary, self.backend)

        return run


def ultragen(
    model: Any,
    preset: str | None = None,
    *,
    settings: UltraGenSettings | None = None,
    parts: UltraGenParts | str | Path | None = None,
    backend: str = "auto",
    **changed: Any,
) -> Handle:
    """Put UltraGen into a pipeline or model of Wan, or into the built-in video model.

    preset: of `PRESETS`; None takes the published one. settings: instead of a preset. changed: single fields of the
    settings, such as ``hierarchical=False``. parts: trained parts or the file of them, which bring their settings; None
    makes fresh ones. `handle.method.parts` holds them: train `parts.parameters()`, keep `parts.save(path)`.
    Raises ValueError for another model, an unknown preset or field, and settings beside parts.
    """
    models = models_of(model)
    for one in models.values():
        host_of(one)
    if preset is not None:
        check_choice("ultragen: preset", preset, PRESETS)
    if parts is None:
        base = PRESETS["wan2.1-1.3b" if preset is None else preset].settings if settings is None else settings
        parts = UltraGenParts(model, changed_in("ultragen", base, changed))
    else:
        if settings is not None or preset is not None or changed:
            raise ValueError("ultragen: parts bring their settings; legal: parts alone, or settings without parts.")
        parts = parts if isinstance(parts, UltraGenParts) else UltraGenParts.from_pretrained(model, parts)
    handle = attach(model, UltraGen(models, parts, backend=backend))
    if parts.settings.ffn_lora:
        handle.last(_hook_feed_forward(model, models, parts))
    return handle


def _hook_feed_forward(model: Any, models: Mapping[str, nn.Module], parts: UltraGenParts) -> Callable[[], None]:
    """Updates on the feed-forward layers; the call takes them off."""
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for site in sites_of(model):
        if site.kind != "self":
            continue
        one = models[site.component if len(models) > 1 else next(iter(models))]
        path, layers = host_of(one).feed_forward(one, site.name)
        for name, layer in layers.items():
            update = parts.feed_forward(site.component, path)[f"lora_{name}"]
            hooks.append(layer.register_forward_hook(partial(_add, update)))

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def _add(update: LowRank, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out + update(args[0])
