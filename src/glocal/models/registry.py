"""Published architectures by name: what each was built with, its size and figures, as data.

model = create_model("dinat_tiny", num_classes=10)
list_models("dinat_*")
variant("dinat_tiny").params
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from glocal._errors import check_choice, nearest

_FAMILIES = ("vision", "trunks")


@dataclass(frozen=True)
class Variant:
    """One published configuration.

    name: what `create_model` calls it. system: its row in `glocal.systems`, "" for a frame of our own. build: the
    constructor's keywords. params: exact, with `classes` classes. gflops: multiply-adds in 1e9 at `size` px a side, as
    published (None where nothing is). top1: ImageNet-1K accuracy in percent as published (None: none). pretrained_on:
    data before ImageNet-1K. note: what else is worth knowing.
    """

    name: str
    system: str
    build: Mapping[str, Any]
    params: int | None = None
    gflops: float | None = None
    top1: float | None = None
    size: int = 224
    classes: int = 1000
    pretrained_on: str = ""
    note: str = ""
    make: Callable[..., nn.Module] = field(default=nn.Module, repr=False)


_VARIANTS: dict[str, Variant] = {}


def register_model(make: Callable[..., nn.Module], variants: Iterable[Variant]) -> None:
    """Add variants that `make(**variant.build)` builds. A name can be taken once."""
    for each in variants:
        if each.name in _VARIANTS:
            raise ValueError(f"register_model: {each.name!r} is taken by {_VARIANTS[each.name].system!r}.")
        _VARIANTS[each.name] = Variant(**{**vars(each), "make": make})


@cache
def _load_all() -> None:
    """Import every file of the families, so that each registers what it has."""
    for family in _FAMILIES:
        for module in pkgutil.iter_modules([str(Path(__file__).parent / family)]):
            if not module.name.startswith("_"):
                importlib.import_module(f"glocal.models.{family}.{module.name}")


def list_models(pattern: str = "*", system: str | None = None) -> list[str]:
    """Names of variants that match `pattern` (as a file pattern, "gc_*") and belong to `system`, sorted. Raises
    ValueError for a system without models.
    """
    _load_all()
    if system is not None:
        check_choice("list_models: system", system, sorted({v.system for v in _VARIANTS.values()}))
    return sorted(n for n, v in _VARIANTS.items() if fnmatchcase(n, pattern) and system in (None, v.system))


def variant(name: str) -> Variant:
    """The record of a published configuration; ValueError with the closest names for an unknown one."""
    _load_all()
    if name not in _VARIANTS:
        near = difflib.get_close_matches(name, _VARIANTS, n=3, cutoff=0.5)
        hint = f"closest: {', '.join(near)}" if near else "list_models() has them all"
        raise ValueError(f"unknown model {name!r}; {hint}.")
    return _VARIANTS[name]


def create_model(
    name: str, *, num_classes: int | None = None, in_chans: int = 3, features_only: bool = False, **changes: Any
) -> nn.Module:
    """Build a published configuration with fresh weights.

    name: one of `list_models()`. num_classes: None is the published number; 0 leaves the classifier out. in_chans:
    channels of the image. features_only: the model returns [B, C, H, W] maps of its levels. changes: other keywords
    of the architecture, over those of the variant (drop_path=0.1, ...).

    Raises ValueError for an unknown name, TypeError for a keyword the architecture does not take.
    """
    found = variant(name)
    takes = inspect.signature(found.make).parameters
    strange = [key for key in changes if key not in takes]
    if strange and all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in takes.values()):
        raise TypeError(
            f"create_model: {name!r} does not take {', '.join(map(repr, strange))}; it takes {', '.join(takes)}; "
            f"nearest: {nearest(strange[0], takes)}. Published weights are read by load_published."
        )
    classes = found.classes if num_classes is None else num_classes
    keywords = {**found.build, **changes}
    return found.make(num_classes=classes, in_chans=in_chans, features_only=features_only, **keywords)
