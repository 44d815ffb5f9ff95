"""Published settings of a method for a model: found by class, or named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

from glocal._errors import check_choice, nearest
from glocal.adapt.pipelines import is_pipeline, parts

T = TypeVar("T")


@dataclass(frozen=True)
class Preset(Generic[T]):
    """settings of a method for models of `classes`; `experts`: how many denoising models the pipeline has.

    source: where they are published.
    """

    settings: T
    classes: tuple[str, ...]
    source: str
    experts: int | None = None

    def fits(self, model: Any) -> bool:
        """Whether the settings were published for models like this one."""
        found = list(parts(model).values()) if is_pipeline(model) else [model]
        names = {c.__name__ for part in found for c in type(part).__mro__}
        return bool(names & set(self.classes)) and (
            self.experts is None or not is_pipeline(model) or self.experts == len(found)
        )


def chosen(who: str, presets: Mapping[str, Preset[T]], model: Any, name: str | None) -> T:
    """The settings called `name`, or the first published ones for a model of this class.

    Raises ValueError for an unknown name, one of another class, and a class without any.
    """
    if name is None:
        for preset in presets.values():
            if preset.fits(model):
                return preset.settings
        raise ValueError(
            f"{who}: nothing is published for {_class(model)}; known: {', '.join(presets)}. Give the settings "
            f"yourself: {who}(model, settings=...)."
        )
    check_choice(f"{who}: preset", name, presets)
    if not presets[name].fits(model):
        mine = [n for n, p in presets.items() if p.fits(model)]
        raise ValueError(
            f"{who}: preset={name!r} is for {' and '.join(presets[name].classes)}, this is {_class(model)}; for it: "
            f"{', '.join(mine) if mine else 'none'}."
        )
    return presets[name].settings


def changed_in(who: str, settings: T, changed: Mapping[str, Any]) -> T:
    """The settings, a dataclass, with single fields changed; ValueError for a name that is no field."""
    legal = [f.name for f in fields(settings)]  # type: ignore[arg-type]
    for name, value in changed.items():
        if name not in legal:
            near = nearest(name, legal)
            raise ValueError(f"{who}: {name}={value!r} is unknown; legal: {', '.join(legal)}; nearest: {near}.")
    return replace(settings, **changed)  # type: ignore[type-var]


def _class(model: Any) -> str:
    if is_pipeline(model):
        return f"{type(model).__name__} of {' and '.join(type(p).__name__ for p in parts(model).values())}"
    return type(model).__name__
