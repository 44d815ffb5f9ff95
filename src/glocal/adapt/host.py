"""Hosts: how to find the attention sites of a model and put something in their place. One adapter a model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, Protocol

from torch import nn

from glocal.adapt.records import Core, RunState, Site

Point = Literal["core", "module", "layer", "forward", "step"]
Undo = Callable[[], None]
Wrapper = Callable[..., Any]


class HostAdapter(Protocol):
    """What a host file offers. Every wrap keeps the original and returns the call that puts it back."""

    points: frozenset[Point]

    def sites(self, model: Any) -> Sequence[Site]:
        """The attention sites in the order they run."""
        ...

    def watch(self, model: Any, state: RunState) -> Undo:
        """Keep `state` up to date while the model runs."""
        ...

    def wrap_core(self, model: Any, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """Put ``core(inner)`` where the site computes attention; `inner` is what stood there, as a Core."""
        ...

    def wrap(self, model: Any, point: Point, name: str, wrapper: Callable[[Wrapper], Wrapper]) -> Undo:
        """Replace a forward by ``wrapper(original)``: of the attention module `name` (point "module"), of the layer
        that holds it ("layer") or of the whole model ("forward", name "").
        """
        ...


CoreFactory = Callable[[Core], Core]

_DIFFUSERS = "diffusers.models.transformers"
_HERE = "glocal.adapt.hosts.diffusers"
_BUILT_IN = {
    "glocal.models.generation.video_dit.VideoDiT": "glocal.adapt.hosts.video_dit",
    "glocal.models.generation.image_dit.ImageDiT": f"{_HERE}.wan",
    "glocal.models.generation.image_unet.ImageUNet": f"{_HERE}.unet",
    "glocal.models.language.decoder.Decoder": "glocal.adapt.hosts.decoder",
    f"{_DIFFUSERS}.cogvideox_transformer_3d.CogVideoXTransformer3DModel": f"{_HERE}.cogvideox",
    f"{_DIFFUSERS}.pixart_transformer_2d.PixArtTransformer2DModel": f"{_HERE}.pixart",
    f"{_DIFFUSERS}.transformer_cosmos.CosmosTransformer3DModel": f"{_HERE}.cosmos",
    f"{_DIFFUSERS}.transformer_flux.FluxTransformer2DModel": f"{_HERE}.flux",
    f"{_DIFFUSERS}.transformer_flux2.Flux2Transformer2DModel": f"{_HERE}.flux2",
    f"{_DIFFUSERS}.transformer_hunyuan_video.HunyuanVideoTransformer3DModel": f"{_HERE}.hunyuan_video",
    f"{_DIFFUSERS}.transformer_ltx.LTXVideoTransformer3DModel": f"{_HERE}.ltx",
    f"{_DIFFUSERS}.transformer_mochi.MochiTransformer3DModel": f"{_HERE}.mochi",
    f"{_DIFFUSERS}.transformer_sd3.SD3Transformer2DModel": f"{_HERE}.sd3",
    f"{_DIFFUSERS}.transformer_wan.WanTransformer3DModel": f"{_HERE}.wan",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel": f"{_HERE}.unet",
    **{
        f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}{kind}": (
            "glocal.adapt.hosts.transformers.decoder"
        )
        for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2")
        for kind in ("ForCausalLM", "Model")
    },
    **{
        f"transformers.models.gemma3.modeling_gemma3.{name}": "glocal.adapt.hosts.transformers.decoder"
        for name in ("Gemma3ForCausalLM", "Gemma3TextModel")
    },
}
_REGISTERED: dict[str, HostAdapter] = {}


def register_host(model_class: str, adapter: HostAdapter) -> None:
    """Teach glocal a model: `model_class` is its full dotted name, also of a base class."""
    _REGISTERED[model_class] = adapter


def host_of(model: Any) -> HostAdapter:
    """The adapter of a model, found along its base classes; ValueError names the nearest known class."""
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__]
    for name in names:
        if name in _REGISTERED:
            return _REGISTERED[name]
        if name in _BUILT_IN:
            return import_module(_BUILT_IN[name]).ADAPTER
    private = import_module("glocal.adapt.private")
    if private.is_private(model):
        return private.ADAPTER
    known = sorted({*_REGISTERED, *_BUILT_IN})
    near = get_close_matches(names[0], known, n=1, cutoff=0.3)
    inside = [n for n in ("transformer", "transformer_2") if isinstance(getattr(model, n, None), nn.Module)]
    raise ValueError(
        f"No host adapter for {names[0]}. Known: {', '.join(known)}."
        + (f" Attach to its {' and its '.join(inside)} instead." if inside else "")
        + (f" Nearest: {near[0]}." if near and not inside else "")
        + " Write one with glocal.adapt.register_host, or put glocal.adapt.site() where the model computes attention "
        "and show it once to glocal.adapt.discover(model, ...)."
    )


def wrap_forward(model: Any, point: Point, name: str, wrapper: Callable[[Wrapper], Wrapper]) -> Undo:
    """`HostAdapter.wrap` where a layer is the module that holds its attention."""
    if point == "forward":
        return replace_forward(model, wrapper)
    return replace_forward(model.get_submodule(name if point == "module" else name.rpartition(".")[0]), wrapper)


def replace_forward(module: nn.Module, wrapper: Callable[[Wrapper], Wrapper]) -> Undo:
    """Put ``wrapper(module.forward)`` in place; the undo leaves the module's attributes as they were.

    Offloading that came later (hooks of accelerate, which keep what they found as `_old_forward`) stays in place.
    """
    had = "forward" in module.__dict__
    original = module.forward
    mine = wrapper(original)
    module.forward = mine  # type: ignore[method-assign]

    def undo() -> None:
        if module.__dict__.get("_old_forward") is mine:
            module._old_forward = original  # type: ignore[assignment]
        elif had:
            module.forward = original  # type: ignore[method-assign]
        else:
            del module.__dict__["forward"]

    return undo
