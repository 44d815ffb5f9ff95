"""Reads the checkpoints that authors published, strictly, and says in words what does not fit.

Files are safetensors or `torch.save`, the latter with `weights_only=True` and only those extra types that published
training scripts put beside the weights.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glocal._errors import GlocalError
from glocal.models.registry import create_model, list_models, variant
from glocal.nn.blocks import resize_flat_table, resize_table
from glocal.nn.blocks.relative import Resize

Shapes = dict[str, tuple[int, ...]]
_WRAPPERS = ("state_dict_ema", "model_ema", "params_ema", "state_dict", "model", "params", "module")
_COUNTER = "num_batches_tracked"  # of batch norms; converted checkpoints may lack it
_PREFIXES = ("module.", "backbone.", "encoder.", "model.")


class CheckpointError(GlocalError, ValueError):
    """A file holds other weights than the model needs; the message lists which."""


def load_published(path: str | Path, model: nn.Module | str | None = None, *, resize: bool = False) -> nn.Module:
    """Load a published checkpoint strictly and return the model, in evaluation mode.

    path: `.safetensors`, or a file of torch.save.
    model: the model to fill; or the name of a variant; or None, and the variant is found by the names and shapes in
        the file (its file name decides between variants of equal shapes, such as nat_tiny and dinat_tiny).
    resize: relative position tables of another window are interpolated, head by head as the authors do, instead of
        refused.

    The classifier gets as many classes as the file has. A `features_only` model takes the trunk of a classifier, and
    keeps its own level norms if the file has none. Raises FileNotFoundError; CheckpointError in words.
    """
    path = Path(path)
    state = read_state(path)
    if model is None:
        model = infer_variant(state, path.name)
    if isinstance(model, str):
        found = variant(model)
        ready = getattr(found.make, "convert", dict)(state)
        model = create_model(model, num_classes=_classes(found.make, ready))
    fill(model, state, str(path), resize=resize)
    return model.eval()


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, without the wrappers and prefixes that training scripts add."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such checkpoint", str(path))
    try:
        content = _content(path)
    except Exception as error:  # torch.load raises what it met: KeyError, EOFError, UnpicklingError, ...
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: neither .safetensors nor a file of torch.save that is safe to read: {why}"
        ) from error
    return unwrap(content, str(path))


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals(_safe_types()):
        return torch.load(path, map_location="cpu", weights_only=True)


def unwrap(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: EMA weights before others, no `module.` or `backbone.` before every name."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            raise CheckpointError(f"{where}: no state dict found; top-level names: {', '.join(map(str, content))}.")
        content = content[inner]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: holds a {type(content).__name__}, not a state dict.")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str = "state", *, resize: bool = False) -> None:
    """Copy `state` into `model`, every tensor of it. Raises CheckpointError for missing, strange or misshapen ones.

    resize: as in `load_published`.
    """
    state = getattr(type(model), "convert", dict)(state)
    wanted: Shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = {name: value for name, value in state.items() if name in wanted or not _unneeded(model, name)}
    if resize:
        state = {name: _resized(model, name, value, wanted.get(name)) for name, value in state.items()}
    optional = {name for name in wanted if _optional(model, name)}
    missing = sorted(set(wanted) - set(state) - optional)
    strange = sorted(set(state) - set(wanted))
    misshapen = [n for n, value in state.items() if n in wanted and tuple(value.shape) != wanted[n]]
    if missing or strange or misshapen:
        raise CheckpointError(_complaint(where, model, wanted, state, (missing, strange, misshapen)))
    model.load_state_dict(dict(state), strict=not optional)


def infer_variant(state: Mapping[str, Tensor], filename: str = "") -> str:
    """The published variant whose names and shapes `state` has; CheckpointError if none or several fit."""
    fits = [name for name in list_models() if _fits(name, state)]
    if len(fits) > 1:
        named = [name for name in fits if filename.lower().startswith(name)]
        fits = [max(named, key=len)] if named else fits
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise CheckpointError(
            f"the weights fit {', '.join(fits)}, which have equal shapes; say which: load_published(path, {fits[0]!r})."
        )
    near = difflib.get_close_matches(filename.lower(), list_models(), n=3, cutoff=0.4)
    hint = f"; by the file's name it may be meant for {' or '.join(near)}" if near else ""
    first = ", ".join(list(state)[:3])
    raise CheckpointError(f"no known variant has these {len(state)} tensors ({first}, ...){hint}.")


def _fits(name: str, state: Mapping[str, Tensor]) -> bool:
    make = variant(name).make
    converted = getattr(make, "convert", dict)(state)
    if not _like(name, converted):
        return False
    shapes = _shapes(name)
    if not {key for key in shapes if not key.endswith(_COUNTER)} <= set(converted):
        return False
    head = getattr(make, "classifier", "head") + "."
    ignored = getattr(make, "ignored", ())
    extra = [key for key in converted if key not in shapes and not key.endswith(ignored)]
    return not extra and all(
        tuple(converted[k].shape) == s for k, s in shapes.items() if k in converted and not k.startswith(head)
    )


def _like(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether the number of weights is near that of a variant: spares building most of the models."""
    found = variant(name)
    head = state.get(f"{getattr(found.make, 'classifier', 'head')}.weight")
    if found.params is None or head is None:
        return True
    trunk = sum(value.numel() for value in state.values() if value.is_floating_point()) - head.numel() - head.shape[0]
    published = found.params - found.classes * (head.shape[1] + 1)
    return abs(trunk - published) <= 0.05 * published


@lru_cache(maxsize=512)
def _shapes(name: str) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in create_model(name).state_dict().items()}


def _classes(make: Any, state: Mapping[str, Tensor]) -> int:
    head = state.get(f"{getattr(make, 'classifier', 'head')}.weight")
    return 0 if head is None else head.shape[0]


def _unneeded(model: nn.Module, name: str) -> bool:
    """Names of a file that a model may leave: tables of indices, and all behind the trunk for a features model."""
    if name.endswith(getattr(model, "ignored", ())):
        return True
    behind = (f"{getattr(model, 'classifier', 'head')}.", "norm.", "norms.", "head.", *getattr(model, "behind", ()))
    return getattr(model, "features_only", False) and name.startswith(behind)


def _optional(model: nn.Module, name: str) -> bool:
    if name.endswith(_COUNTER):
        return True
    levels = tuple(f"norm{i}." for i in range(len(getattr(model, "channels", ()))))
    return getattr(model, "features_only", False) and name.startswith(levels)


def _layout(model: nn.Module, name: str) -> str | None:
    """How the relative table `name` lies, None for other tensors."""
    tables: Mapping[str, str] = getattr(model, "tables", {})
    return next((layout for ending, layout in tables.items() if name.endswith(ending)), None)


def _resized(model: nn.Module, name: str, value: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    layout = _layout(model, name)
    if layout is None or shape is None or tuple(value.shape) == shape:
        return value
    mode: Resize = getattr(model, "table_resize", "bicubic")
    if layout == "heads_first":
        heads = value.reshape(-1, *value.shape[-2:])  # a table for all heads has no first axis
        return resize_table(heads, (shape[-2], shape[-1]), mode).reshape(*value.shape[:-2], *shape[-2:])
    return resize_flat_table(value, (isqrt(shape[0]) + 1) // 2, mode)


def _complaint(
    where: str,
    model: nn.Module,
    wanted: Shapes,
    state: Mapping[str, Tensor],
    wrong: tuple[list[str], list[str], list[str]],
) -> str:
    missing, strange, misshapen = wrong
    lines = [f"{where} does not fit {type(model).__name__}:"]
    for title, names, others in (("missing", missing, strange), ("unexpected", strange, missing)):
        if names:
            shown = [_with_nearest(name, others) for name in names[:4]]
            lines.append(f"  {len(names)} {title}: {', '.join(shown)}{', ...' if len(names) > 4 else ''}")
    if misshapen:
        shown = [f"{n} is {tuple(state[n].shape)}, the model has {wanted[n]}" for n in misshapen[:4]]
        lines.append(f"  {len(misshapen)} of another shape: {'; '.join(shown)}{'; ...' if len(misshapen) > 4 else ''}")
    if any(_layout(model, name) is not None for name in misshapen):
        lines.append("  relative tables of another window: load_published(..., resize=True) interpolates them.")
    fits = [name for name in list_models() if _fits(name, state)]
    if fits:
        lines.append(f"  the file has the weights of {' or '.join(fits)}.")
    return "\n".join(lines)


def _with_nearest(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f"{name} (nearest: {near[0]})" if near else name


def _safe_types() -> list[Any]:
    """Types that published checkpoints hold beside tensors: arguments of a script, numpy numbers."""
    scalar = np.core.multiarray.scalar if np.__version__ < "2" else np._core.multiarray.scalar  # type: ignore[attr-defined]
    return [argparse.Namespace, scalar, np.dtype, type(np.dtype("float64")), type(np.dtype("int64"))]
