"""Files of the built-in models: float16 safetensors, and in the metadata what a reader needs to build the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from glocal._files import write_atomic

WEIGHTS = Path(__file__).parent / "weights"  # of the models that ship with the package
Model = TypeVar("Model", bound=nn.Module)


def write(model: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write all parameters as float16 with `metadata`; a reader never meets half a file."""
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, save(tensors, metadata=dict(metadata)))


def read(
    path: Path,
    form: tuple[str, str],
    build: Callable[[dict[str, str]], Model],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """The model of a file, loaded strictly, in evaluation mode.

    form: the format that the metadata must name, and the script that makes such files. build: makes the untrained
    model from the metadata. Raises FileNotFoundError for a missing file, ValueError for a file of another format.
    """
    format, script = form
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r} do not exist; train them with {script}")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        found = None if metadata is None else metadata.get("format")
        if metadata is None or found != format:
            raise ValueError(f"weights {str(path)!r} have format {found!r}: need {format!r}")
        state = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118 (not a dict)
    model = build(metadata).to(dtype)
    model.load_state_dict(state, strict=True)
    return model.to(device).eval()


def sizes(metadata: Mapping[str, str], config: type[Any], path: Path) -> dict[str, Any]:
    """The entry `config` of the metadata; ValueError unless it has the fields of the record `config`."""
    found, known = json.loads(metadata["config"]), {f.name for f in fields(config)}
    if set(found) != known:
        raise ValueError(f"weights {str(path)!r} have sizes {sorted(found)}: need {sorted(known)}")
    return found
