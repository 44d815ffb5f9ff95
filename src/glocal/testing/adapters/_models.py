"""What the adapters of whole models share: parameter manifests and published state."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from glocal.nn import NeighborhoodSpec
from glocal.testing.case import Case


def manifest(shapes: Mapping[str, Sequence[int]], params: int) -> dict[str, Tensor]:
    """Names and shapes of a state (as a hash of each, in sorted order) and the number of parameters."""
    words = sorted(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    hashes = torch.tensor([zlib.crc32(word.encode()) for word in words])
    return {"out.keys": hashes, "out.params": torch.tensor(params)}


def manifest_of(model: nn.Module) -> dict[str, Tensor]:
    """The manifest of a model of ours."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return manifest(shapes, sum(p.numel() for p in model.parameters()))


def published(case: Case) -> dict[str, Tensor]:
    """The manifest of a `*.keys.json` record."""
    return manifest(case.record["keys"], case.record["params"])


def with_state(model: nn.Module, case: Case, backend: str) -> nn.Module:
    """The model with the published weights, in evaluation mode, its attention on `backend`."""
    model.load_state_dict(case.group("state"), strict=True)
    for module in model.modules():
        if isinstance(getattr(module, "spec", None), NeighborhoodSpec):
            module.spec = replace(module.spec, backend=backend)  # type: ignore[arg-type]
    return model.to(case["in.x"].device).eval()
