"""What the adapters of backbones share: manifests of checkpoints, and models with the weights of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from glocal.models import create_model
from glocal.models.checkpoints import fill
from glocal.testing.case import Case

_Model = TypeVar("_Model", bound=nn.Module)


def is_manifest(case: Case) -> bool:
    """Whether the case is a list of parameter names and shapes."""
    return isinstance(case.record, Mapping) and "keys" in case.record


def manifest_expected(case: Case) -> dict[str, Tensor]:
    """Shapes of all names of a manifest, and its number of parameters, as integers to be met exactly."""
    shapes = {name: torch.tensor(shape, dtype=torch.int64) for name, shape in case.record["keys"].items()}
    return {**shapes, "params": torch.tensor(case.record["params"])}


def manifest_run(name: str, case: Case) -> dict[str, Tensor]:
    """The same of our variant `name`, after a state of the manifest's shapes was loaded strictly.

    Tensors that hold no weights (indices made by the authors' constructor) are taken from the manifest.
    """
    with torch.device("meta"):
        model = create_model(name.removeprefix("h_"))
        state = {key: torch.empty(shape) for key, shape in case.record["keys"].items()}
    fill(model, state, case.name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    ignored = getattr(model, "ignored", ())
    shapes |= {key: tuple(value.shape) for key, value in state.items() if ignored and key.endswith(ignored)}
    params = sum(parameter.numel() for parameter in model.parameters())
    return {**{key: torch.tensor(s, dtype=torch.int64) for key, s in shapes.items()}, "params": torch.tensor(params)}


def expected(case: Case) -> dict[str, Tensor]:
    """`Adapter.expected` of a backbone: manifests as integers, other cases as they are."""
    return manifest_expected(case) if is_manifest(case) else case.results()


def ready(model: _Model, case: Case, state: Mapping[str, Tensor] | None = None) -> _Model:
    """`model` in evaluation mode on the case's device, strictly filled with `state` (None: that of the case)."""
    fill(model, case.group("state") if state is None else state, case.name)
    return model.to(case["in.x"].device).eval()


def contiguous_convs(model: nn.Module) -> None:
    """Let the convolutions of `model` read contiguous maps, as published code does; their rounding follows layout."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0].contiguous(),))


def caught(model: nn.Module, parts: Mapping[str, nn.Module], call: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Outputs of some `parts` of `model` during `call`, by name, and the result of the call as ""."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, out: found.__setitem__(name, out)

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            found[""] = call()
    finally:
        for hook in hooks:
            hook.remove()
    return found
