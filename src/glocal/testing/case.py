"""Golden cases: inputs, parameters and results of published code, one file a case, one folder a system.

A `.safetensors` file names its tensors by their role: `in.*` inputs, `state.*` parameters, `out.*` outputs, `mid.*`
intermediates, `grad.*` gradients; its metadata entry `meta` is JSON with `source`, `config` and `note`. A `.json` file
(figures, parameter manifests) is kept as `record`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROLES = ("in", "state", "out", "mid", "grad")


@dataclass(frozen=True, eq=False)
class Case:
    """One golden case. config: what the authors' code was called with; record: the content of a JSON file."""

    path: Path
    system: str
    name: str
    source: str = ""
    config: Any = None
    note: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    record: Any = None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"case {self.name!r} has no tensor {name!r}; it has {', '.join(sorted(self.tensors))}")
        return self.tensors[name]

    def group(self, role: str) -> dict[str, Tensor]:
        """The tensors of one role ("in", "state", "out", "mid" or "grad"), without the prefix."""
        return {name[len(role) + 1 :]: t for name, t in self.tensors.items() if name.startswith(f"{role}.")}

    def results(self) -> dict[str, Tensor]:
        """What the published code computed: `out.*`, `mid.*` and `grad.*`."""
        return {name: t for name, t in self.tensors.items() if name.split(".", 1)[0] in ("out", "mid", "grad")}

    def to(self, device: torch.device | str) -> Case:
        """The same case with its tensors on another device."""
        moved = {name: t.to(device) for name, t in self.tensors.items()}
        return Case(self.path, self.system, self.name, self.source, self.config, self.note, moved, self.record)


def load(path: str | Path) -> Case:
    """Read a case; its system is the name of its folder.

    Raises FileNotFoundError for a missing file, ValueError for one that is not a golden case.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    system = path.resolve().parent.name
    if path.suffix == ".json":
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return Case(path, system, path.name.removesuffix(".json"), record=record)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a golden case is a .safetensors or a .json file, not {path.suffix!r}")
    return _read(path, system)


def _read(path: Path, system: str) -> Case:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            words = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if words is None or "meta" not in words:
        raise ValueError(f"{path} has no metadata entry 'meta' (JSON with source, config and note)")
    meta = json.loads(words["meta"])
    strange = sorted(name for name in tensors if name.split(".", 1)[0] not in ROLES)
    if strange:
        raise ValueError(f"{path}: tensors {', '.join(strange)} have no role; legal prefixes: {', '.join(ROLES)}")
    return Case(path, system, path.stem, meta.get("source", ""), meta.get("config"), meta.get("note", ""), tensors)
