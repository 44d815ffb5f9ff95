"""Which systems have published settings for a model, and how a system is made by name: what advice and the command line
read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from glocal.adapt.attach import Method
from glocal.adapt.presets import Preset


@dataclass(frozen=True)
class Kind:
    """A system. settings: their record. method: settings -> method. presets: what is published, by name."""

    settings: type
    method: Callable[[Any], Method]
    presets: Mapping[str, Preset[Any]]


@dataclass(frozen=True)
class Published:
    """Settings of `system`, published in `source` under the name `preset`."""

    system: str
    preset: str
    source: str
    settings: Any

    def method(self, **changed: Any) -> Method:
        """A new method with these settings, single ones changed."""
        return kind(self.system).method(replace(self.settings, **changed))


_KINDS = {
    "gna": ("GNASettings", "GNA"),
    "radial": ("RadialSettings", "Radial"),
    "rectified_spaattn": ("SpaSettings", "RectifiedSpaAttn"),
    "tile_windows": ("TileSettings", "TileMethod"),
}


def kinds() -> tuple[str, ...]:
    """The systems that are made from settings alone (`paro` needs a plan of the model)."""
    return tuple(_KINDS)


def kind(system: str) -> Kind:
    """One system; ValueError names the nearest."""
    if system not in _KINDS:
        near = get_close_matches(system, _KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"system={system!r} is no method of settings; legal: {', '.join(_KINDS)}; nearest: {near}.")
    module = import_module(f"glocal.adapt.{system}")
    settings, method = (getattr(module, name) for name in _KINDS[system])
    return Kind(settings, method, getattr(module, "PRESETS", {}))


def published(model: Any) -> tuple[Published, ...]:
    """What is published for models, or pipelines, like this one; empty where nothing is."""
    found: list[Published] = []
    for system in _KINDS:
        for name, preset in kind(system).presets.items():
            if preset.fits(model):
                found.append(Published(system, name, preset.source, preset.settings))
    return tuple(found)


def made(system: str, settings: Mapping[str, Any]) -> Method:
    """A method from names and plain values, as a command line gives them: lists become tuples.

    ``made("tile_windows", {"tile": [4, 8, 8], "window": [3, 3, 3]})``; for `gna` window, stride and dilation stand
    beside the other settings. Raises ValueError for an unknown or a missing setting.
    """
    one = kind(system)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    if system == "gna" and "window" in values:
        window = import_module("glocal.adapt.gna").Window
        values["window"] = window(**{n: values.pop(n) for n in ("window", "stride", "dilation") if n in values})
    legal = [f.name for f in fields(one.settings)]
    unknown = [name for name in values if name not in legal]
    if unknown:
        near = get_close_matches(unknown[0], legal, n=1, cutoff=0.0)[0]
        raise ValueError(f"{system}: {unknown[0]} is unknown; legal: {', '.join(legal)}; nearest: {near}.")
    try:
        return one.method(one.settings(**values))
    except TypeError as error:
        missing = [name for name in legal if repr(name) in str(error)]
        raise ValueError(f"{system}: {', '.join(missing)} must be given; settings: {', '.join(legal)}.") from error
