"""Which systems have published settings for a model, and how a system is made by name: what advice and the command line
read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from importlib import import_module
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from glocal._errors import nearest
from glocal.adapt.attach import Method
from glocal.adapt.presets import Preset


@dataclass(frozen=True)
class Kind:
    """A system. settings: their record. method: settings -> method. presets: what is published, by name. plain: fields
    that have plain values; the others come with a preset.
    """

    settings: type
    method: Callable[[Any], Method]
    presets: Mapping[str, Preset[Any]]
    plain: tuple[str, ...]


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


# system -> record of settings, what makes the method
_KINDS = {
    "freeswim": ("FreeSwimSettings", "FreeSwim"),
    "gna": ("GNASettings", "GNA"),
    "hidiffusion": ("HiSettings", "HiDiffusion"),
    "paro": ("ParoSettings", "paro_of"),
    "radial": ("RadialSettings", "Radial"),
    "rectified_spaattn": ("SpaSettings", "RectifiedSpaAttn"),
    "teacache": ("TeaSettings", "TeaCache"),
    "tile_windows": ("TileSettings", "TileMethod"),
}
_APART = {"hidiffusion": ("places", "shares")}  # fields without plain values
_OTHER_AIMS = ("freeswim", "hidiffusion")  # they make large pictures, not the same ones in less time


def kinds() -> tuple[str, ...]:
    """The systems that `made` makes; settings of `paro` name a file with a plan of the model."""
    return tuple(_KINDS)


def kind(system: str) -> Kind:
    """One system; ValueError names the nearest."""
    if system not in _KINDS:
        near = nearest(system, _KINDS)
        raise ValueError(f"system={system!r} is no method of settings; legal: {', '.join(_KINDS)}; nearest: {near}.")
    module = import_module(f"glocal.adapt.{system}")
    settings, method = (getattr(module, name) for name in _KINDS[system])
    plain = tuple(f.name for f in fields(settings) if f.name not in _APART.get(system, ()))
    return Kind(settings, method, getattr(module, "PRESETS", {}), plain)


def published(model: Any, *, large: bool = False) -> tuple[Published, ...]:
    """What is published for models, or pipelines, like this one; empty where nothing is.

    large: of the systems for sizes beyond the trained one instead of those that save time.
    """
    found: list[Published] = []
    for system in [name for name in _KINDS if (name in _OTHER_AIMS) == large]:
        for name, preset in kind(system).presets.items():
            if preset.fits(model):
                found.append(Published(system, name, preset.source, preset.settings))
    return tuple(found)


def made(system: str, settings: Mapping[str, Any]) -> Method:
    """A method from names and plain values, as a command line gives them: lists become tuples.

    ``made("tile_windows", {"tile": [4, 8, 8], "window": [3, 3, 3]})``; for `gna` window, stride and dilation stand
    beside the other settings. ``preset`` names published settings, of which the others given change single ones;
    `hidiffusion` needs one. Raises ValueError for an unknown or a missing setting, and for a value of another kind.
    """
    one = kind(system)
    values = dict(settings)
    preset = values.pop("preset", None)
    if system == "gna" and "window" in values:
        window = import_module("glocal.adapt.gna").Window
        parts = {n: values.pop(n) for n in ("window", "stride", "dilation") if n in values}
        values["window"] = window(**_typed(system, parts, window))
    legal = [*one.plain, *(["preset"] if one.presets else [])]
    unknown = [name for name in values if name not in one.plain]
    if unknown:
        near = nearest(unknown[0], legal)
        raise ValueError(f"{system}: {unknown[0]} is unknown; legal: {', '.join(legal)}; nearest: {near}.")
    values = _typed(system, values, one.settings)
    if preset is not None:
        if preset not in one.presets:
            names = ", ".join(one.presets) if one.presets else "none is published"
            raise ValueError(f"{system}: preset={preset!r} is unknown; legal: {names}.")
        return one.method(replace(one.presets[preset].settings, **values))
    missing = [f.name for f in fields(one.settings) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in missing if name not in values]
    if missing:
        hint = f"; or a preset: {', '.join(one.presets)}" if one.presets else ""
        words = ", ".join(name for name in missing if name in one.plain) if set(missing) & set(one.plain) else "preset"
        raise ValueError(f"{system}: {words} must be given; settings: {', '.join(legal)}{hint}.")
    return one.method(one.settings(**values))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}


def _typed(system: str, values: Mapping[str, Any], record: type) -> dict[str, Any]:
    """Plain values as the fields of `record` want them; ValueError for a value of another kind."""
    hints = get_type_hints(record)
    found = {}
    for name, value in values.items():
        options = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
        fit = [kind for kind in options if _fits(value, kind)]
        if not fit:
            raise ValueError(f"{system}: {name}={value!r}; legal: {' or '.join(map(_words, options))}.")
        make = get_origin(fit[0])
        found[name] = make(value) if make in (tuple, frozenset) else value
    return found


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin in (tuple, frozenset):
        return isinstance(value, (list, tuple, frozenset)) and all(_fits(entry, get_args(kind)[0]) for entry in value)
    if kind in _WORDS:  # True is no number here, 1 is one
        return type(value) is kind or (kind is float and type(value) is int)
    return isinstance(value, kind if origin is None else origin)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (tuple, frozenset):
        return f"a list of {'whole ' if get_args(kind)[0] is int else ''}numbers"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
