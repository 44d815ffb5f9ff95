"""Our backbones under timm's `create_model`, where timm is installed: `glocal_davit_tiny` beside timm's `davit_tiny`.

timm (https://github.com/huggingface/pytorch-image-models) keeps a registry of functions; each of ours builds a variant
with fresh weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from glocal.models.registry import create_model, list_models

PREFIX = "glocal_"
_OWN = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # what timm passes on and we have no use for


def register_with_timm() -> list[str]:
    """Register every variant with timm as `glocal_<name>`; returns the names. Calling it again does nothing new.

    Raises ModuleNotFoundError where timm is not installed.
    """
    try:
        from timm.models import is_model, register_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("register_with_timm needs timm: pip install timm", name="timm") from error
    names = [PREFIX + name for name in list_models()]
    for name in names:
        if not is_model(name):
            register_model(_entry(name))
    return names


def _entry(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **keywords: Any) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"{name}: pretrained=True has no file to download; read the authors' with glocal.models.load_published."
            )
        return create_model(name.removeprefix(PREFIX), **{k: v for k, v in keywords.items() if k not in _OWN})

    build.__name__ = build.__qualname__ = name
    return build
