"""What a model is, in hashes: its class, its configuration and its weights, so that a recipe knows its own.

The weights hash covers every tensor's name, shape and at most 64 KiB of its bytes, spread evenly from start to end. An
adapter that is not merged adds tensors and one that is merged changes them, so both change the hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from glocal.adapt.attach import sites_of
from glocal.adapt.pipelines import is_pipeline

SAMPLED = 64 * 1024
PIECE = 1024


@dataclass(frozen=True)
class Mismatch:
    """One way in which a model differs from the one a recipe was proven on."""

    field: str
    recipe: str
    model: str


def weights_sha256(module: nn.Module) -> str:
    """Hash of all parameters and buffers that are saved with the module. ValueError for weights that are not loaded."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise ValueError(f"weight {name!r} is on the meta device, so it has no values to hash; load the weights.")
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(sampled_bytes(tensor))
    return found.hexdigest()


def sampled_bytes(tensor: Tensor) -> bytes:
    """All bytes of a tensor up to 64 KiB, else 64 pieces of 1 KiB spread evenly, first and last included."""
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return b""
    raw = flat.view(torch.uint8)
    if raw.numel() > SAMPLED:
        starts = torch.linspace(0, raw.numel() - PIECE, SAMPLED // PIECE, dtype=torch.float64).long()
        raw = torch.cat([raw[start : start + PIECE] for start in starts.tolist()])
    return raw.cpu().numpy().tobytes()


def config_sha256(module: Any) -> str | None:
    """Hash of `module.config` (a dataclass, a mapping, or anything with `to_dict`); None if it has none.

    Names that begin with an underscore are a library's notes to itself (where a model was loaded from, which values
    were left at their defaults, in any order), and its version says nothing of the model: both are left out.
    """
    config = getattr(module, "config", None)
    if config is None:
        return None
    told = getattr(config, "to_dict", None)
    if is_dataclass(config) and not isinstance(config, type):
        plain: Any = asdict(config)
    elif callable(told):
        plain = told()
    elif isinstance(config, Mapping):
        plain = dict(config)
    else:
        plain = vars(config)
    plain = {n: v for n, v in plain.items() if not str(n).startswith("_") and n != "transformers_version"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def components(model: Any) -> list[dict[str, Any]]:
    """One record for each component that has attention sites: name, class, hashes, dtype, quantisation, adapters."""
    layers: dict[str, int] = {}
    for site in sites_of(model):
        layers[site.component] = max(layers.get(site.component, 0), site.layer + 1)
    return [{**_component(name, _module(model, name)), "layers": count} for name, count in layers.items()]


def host_record(model: Any, levels: Sequence[float], guidance: float | None) -> dict[str, Any]:
    """`host` of a recipe. levels: noise levels of the run it was proven on; guidance: its scale, None without."""
    library = type(_bare(model)).__module__.partition(".")[0]
    return {
        "library": {"name": library, "tested": [_version(library)]},
        "class": _class(model),
        "components": components(model),
        "scheduler": {**_scheduler(model), "sigmas": [float(level) for level in levels]},
        "guidance": {"kind": "none" if guidance is None else "two_calls", "scale": guidance},
    }


def differences(host: Mapping[str, Any], model: Any) -> list[Mismatch]:
    """Where `model` differs from the components a recipe names; empty if it names none."""
    proven = {c["name"]: c for c in host.get("components", [])}
    if not proven:
        return []
    here = {c["name"]: c for c in components(model)}
    found = [Mismatch(f"host.components[{n}]", n, "no such component") for n in proven if n not in here]
    found += [Mismatch(f"host.components[{n}]", "no such component", n) for n in here if n not in proven]
    for name in proven:
        if name not in here:
            continue
        for key in ("class", "config_sha256", "weights_sha256", "dtype", "quantisation", "adapters"):
            was, now = proven[name].get(key), here[name][key]
            if was is not None and was != now:
                found.append(Mismatch(f"host.components[{name}].{key}", str(was), str(now)))
    return found


def _component(name: str, module: nn.Module) -> dict[str, Any]:
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    return {
        "name": name,
        "class": _class(module),
        "config_sha256": config_sha256(module),
        "weights_sha256": weights_sha256(module),
        "dtype": None if first is None else str(first.dtype).removeprefix("torch."),
        "quantisation": quantisation(module),
        "adapters": adapters(module),
    }


def adapters(module: nn.Module) -> list[dict[str, Any]]:
    """LoRA adapters that are not merged: name, hash of their tensors, and scale (each one, where layers differ). A
    scale is no tensor, so the weights hash does not see it.
    """
    found = []
    for name in sorted(getattr(module, "peft_config", None) or {}):
        digest = hashlib.sha256()
        for key, tensor in sorted(module.state_dict().items()):
            if f".{name}." in key and isinstance(tensor, Tensor):
                digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
                digest.update(sampled_bytes(tensor))
        known: list[Any] = [getattr(part, "scaling", None) for part in module.modules()]
        scales = {scaling[name] for scaling in known if isinstance(scaling, Mapping) and name in scaling}
        ordered = sorted(map(float, scales))
        scale = ordered[0] if len(ordered) == 1 else ordered
        found.append({"name": name, "sha256": digest.hexdigest(), "scale": scale, "fused": False})
    return found


def quantisation(module: nn.Module) -> str | None:
    """How a library says it quantised a module."""
    config = getattr(module, "config", None)
    told = config.get("quantization_config") if isinstance(config, Mapping) else None
    told = getattr(config, "quantization_config", told)
    if told is None:
        return None
    method = told.get("quant_method") if isinstance(told, Mapping) else getattr(told, "quant_method", None)
    return str(getattr(method, "value", method)) if method is not None else type(told).__name__


def _scheduler(model: Any) -> dict[str, Any]:
    """Class and configuration of a pipeline's scheduler, and where a second expert takes over; nothing of others."""
    scheduler = getattr(model, "scheduler", None)
    if not is_pipeline(model) or scheduler is None:
        return {}
    boundary = getattr(getattr(model, "config", None), "boundary_ratio", None)
    return {"class": _class(scheduler), "config_sha256": config_sha256(scheduler), "boundary": boundary}


def _module(model: Any, name: str) -> nn.Module:
    """The component itself: the model, or what a pipeline holds under that name."""
    found = _bare(model if isinstance(model, nn.Module) else getattr(model, name, None))
    if not isinstance(found, nn.Module):
        raise ValueError(f"{type(model).__name__} has no module {name!r}, though its host reports sites there.")
    return found


def _bare(model: Any) -> Any:
    """The module behind `torch.compile`."""
    return getattr(model, "_orig_mod", model)


def _class(model: Any) -> str:
    kind = type(_bare(model))
    return f"{kind.__module__}.{kind.__qualname__}"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
