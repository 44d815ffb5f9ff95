"""The contract of token mixers, and their names.

A mixer is a Module that relates the tokens of a channels-last map:

    x = mixer(x, stage)          # x: [B, *map, dim] -> the same shape

Some systems keep memory for a stage of a backbone (global queries, a significance map, several scales). Their mixers
have `begin`; a host calls `stage = begin(mixers, x)` once before the blocks of a stage and hands `stage` to every mixer
of it. The first mixer of the stage (block 0) owns what `begin` needs. Mixers without memory ignore `stage`.

A system that alternates two mechanisms takes `block`, the index of the block in its stage. Sizes a mixer cannot run are
padded by a rule its docstring states, or refused with a ValueError. A mixer whose work depends on a pattern or a
selection (all that call `glocal.ops.attention`) has `macs(x) -> int`, the multiply-adds of a call on x.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

Builder = Callable[..., nn.Module]
_Builder = TypeVar("_Builder", bound=Builder)
_BUILDERS: dict[str, Builder] = {}


def register_mixer(name: str) -> Callable[[_Builder], _Builder]:
    """Decorate a class or function `(dim, heads, **spec) -> Module` to make it `mixer(name, ...)`."""

    def add(builder: _Builder) -> _Builder:
        known = _BUILDERS.get(name)
        if known is not None and known is not builder:
            raise ValueError(f"register_mixer: {name!r} is already {known.__module__}.{known.__qualname__}.")
        _BUILDERS[name] = builder
        return builder

    return add


@cache
def _load_all() -> None:
    """Import the files of this folder, so that each registers what it has."""
    folder = Path(__file__).parent
    for module in pkgutil.iter_modules([str(folder)]):
        if not module.name.startswith("_"):
            importlib.import_module(f"glocal.nn.{module.name}")


def list_mixers() -> tuple[str, ...]:
    """Names that `mixer` knows."""
    _load_all()
    return tuple(sorted(_BUILDERS))


def mixer(name_or_path: str, dim: int, heads: int, *, block: int = 0, **spec: Any) -> nn.Module:
    """Build a token mixer.

    name_or_path: a name of `list_mixers()`, or "file.py:Class" for a class (or function) in a file of your own, which
        is called as Class(dim, heads, **spec).
    dim, heads: channels and attention heads. block: index of the block in its stage, given to mixers that take it.
    spec: what else the mixer takes.

    Raises ValueError for an unknown name (with the closest ones), and for a `spec` that the mixer does not take;
    FileNotFoundError for a missing file.
    """
    builder = builder_of(name_or_path)
    takes = inspect.signature(builder).parameters
    if "block" in takes:
        spec["block"] = block
    strange = [key for key in spec if key not in takes]
    if strange and all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in takes.values()):
        legal = [key for key in takes if key not in ("self", "dim", "heads", "block")]
        raise ValueError(
            f"mixer: {name_or_path!r} does not take {', '.join(map(repr, strange))}; it takes {', '.join(legal)}."
        )
    return builder(dim, heads, **spec)


def builder_of(name_or_path: str) -> Builder:
    """What `mixer` calls for a name or a "file.py:Class"; raises as it does, before anything is built."""
    return _from_file(name_or_path) if ".py" in name_or_path else _from_name(name_or_path)


def begin(mixers: Iterable[nn.Module], x: Tensor) -> Any:
    """Memory of a stage from its input x: [B, *map, dim]; None where no mixer of the stage keeps any.

    The first of `mixers` that has `begin` makes it.
    """
    for each in mixers:
        start = getattr(each, "begin", None)
        if start is not None:
            return start(x)
    return None


def _from_name(name: str) -> Builder:
    _load_all()
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=3, cutoff=0.4)
        hint = f"closest: {', '.join(map(repr, near))}" if near else f"legal: {', '.join(sorted(_BUILDERS))}"
        raise ValueError(f"mixer: unknown name {name!r}; {hint}; or give a file as 'file.py:Class'.")
    return _BUILDERS[name]


def _from_file(place: str) -> Any:
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not file.endswith(".py"):
        raise ValueError(f"mixer: {place!r} names no class; write 'file.py:Class'.")
    if not path.is_file():
        raise FileNotFoundError(2, "no such file for a mixer", file)
    spec = importlib.util.spec_from_file_location(f"glocal_mixer_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        near = difflib.get_close_matches(
            name, [key for key in vars(module) if not key.startswith("_")], n=3, cutoff=0.4
        )
        hint = f"; closest: {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"mixer: {file} has no class {name!r}{hint}.")
    return found
