"""The trained parts of UltraGen (arXiv 2510.18775) beside a model: one tree of modules, named after attention sites.

``parts = UltraGenParts(model, settings)``; `parts.parameters()` are what training changes (the paper changes the own
weights of the model with them), `parts.state_dict()` and `parts.save(path)` are what it leaves. Names are
``blocks.3.attn1.global.down.weight``, ``...global.up.bias``, ``...hier.lora_q.A``, ``...gate_global.mlp.0.weight``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from glocal._files import write_atomic
from glocal.adapt.attach import sites_of
from glocal.adapt.pipelines import is_pipeline, parts
from glocal.adapt.ultragen_hosts import host_of
from glocal.nn.lora import LowRank
from glocal.nn.ultragen import HierarchicalAttention, UltraGenSettings

FORMAT = "glocal.ultragen/1"


class UltraGenParts(nn.Module):
    """The parts for all self-attention of a model or pipeline, in the dtype and on the device of each model.

    They start as the paper's: average pooling, updates of zero, identity behind the enlargement, gates of one half.
    Names of a pipeline with two denoising models begin with the component.
    """

    def __init__(self, model: Any, settings: UltraGenSettings | None = None) -> None:
        super().__init__()
        self.settings = UltraGenSettings() if settings is None else settings
        models = models_of(model)
        self._many = len(models) > 1
        for site in sites_of(model):
            if site.kind != "self":
                continue
            one = models[site.component if self._many else next(iter(models))]
            host, attention = host_of(one), one.get_submodule(site.name)
            weight = next(attention.parameters())
            made = HierarchicalAttention(*host.sizes(attention), site.layer, self.settings)
            self._put(self._path(site.component, site.name), made.to(weight.device, weight.dtype))
            if self.settings.ffn_lora:
                assert self.settings.rank is not None
                path, layers = host.feed_forward(one, site.name)
                updates = {f"lora_{n}": LowRank.fresh(layer, self.settings.rank) for n, layer in layers.items()}
                self._put(self._path(site.component, path), nn.ModuleDict(updates))
        self.register_state_dict_post_hook(_outward)
        self.register_load_state_dict_pre_hook(_inward)

    def attention(self, component: str, name: str) -> HierarchicalAttention:
        """The parts of one site."""
        found = self.get_submodule(self._path(component, name))
        assert isinstance(found, HierarchicalAttention)
        return found

    def feed_forward(self, component: str, path: str) -> Mapping[str, LowRank]:
        """The updates "lora_in" and "lora_out" of the feed-forward layers kept under a path."""
        return self.get_submodule(self._path(component, path))  # type: ignore[return-value]

    def save(self, path: str | Path) -> None:
        """Write the parts and their settings as safetensors."""
        from safetensors.torch import save

        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        words = {"format": FORMAT, "settings": json.dumps(asdict(self.settings))}
        write_atomic(Path(path), save(tensors, metadata=words))

    @classmethod
    def from_pretrained(cls, model: Any, path: str | Path) -> UltraGenParts:
        """The parts for `model` that `save` wrote, loaded strictly.

        Raises FileNotFoundError, ValueError for a file of another format, and RuntimeError for parts of another model.
        """
        from safetensors import safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(2, "no such file", str(path))
        with safe_open(str(path), framework="pt") as file:
            words = file.metadata()
            if words is None or words.get("format") != FORMAT:
                found = None if words is None else words.get("format")
                raise ValueError(f"ultragen: {str(path)!r} has format {found!r}; legal: {FORMAT!r}.")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made = cls(model, UltraGenSettings(**json.loads(words["settings"])))
        made.load_state_dict(tensors, strict=True)
        return made

    def _path(self, component: str, name: str) -> str:
        return f"{component}.{name}" if self._many else name

    def _put(self, path: str, module: nn.Module) -> None:
        """Keep a module under a dotted path."""
        *outside, last = path.split(".")
        here: nn.Module = self
        for name in outside:
            if name not in here._modules:
                here.add_module(name, nn.Module())
            here = here.get_submodule(name)
        here.add_module(last, module)


def models_of(model: Any) -> dict[str, nn.Module]:
    """The denoising models by component; a model alone stands under "transformer"."""
    return parts(model) if is_pipeline(model) else {"transformer": model}


def _outward(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Names for files: low-rank factors are A and B, as in every paper, and `global` is no word of Python there."""
    for name in [n for n in state if n.startswith(prefix)]:
        state[_swapped(name, (".global_.", ".global."), (".a", ".A"), (".b", ".B"))] = state.pop(name)


def _inward(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The inverse of `_outward`."""
    for name in [n for n in state if n.startswith(prefix)]:
        state[_swapped(name, (".global.", ".global_."), (".A", ".a"), (".B", ".b"))] = state.pop(name)


def _swapped(name: str, inside: tuple[str, str], *ends: tuple[str, str]) -> str:
    name = name.replace(*inside)
    for old, new in ends:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
