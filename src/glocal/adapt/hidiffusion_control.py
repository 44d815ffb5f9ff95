"""ControlNets beside HiDiffusion (arXiv 2311.17528): they see latents and image in the size they were trained for."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from glocal.adapt.host import Undo, replace_forward

_PIXELS = 8  # of the image for one of the latents
_MULTIPLE = 8


def control_size(latent: tuple[int, int], side: int) -> tuple[int, int]:
    """The size (height, width) a ControlNet sees: no side above `side`, both multiples of 8; small latents stay."""
    ratio = max(latent) / side
    if ratio <= 1:
        return latent
    height, width = (max(int(n / ratio) // _MULTIPLE, 1) * _MULTIPLE for n in latent)
    return height, width


def shrink_control(controlnet: nn.Module, side: int) -> Undo:
    """Hand a ControlNet (or several in one) smaller latents (nearest pixels) and images (bilinear, antialiased)."""

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        arguments = signature(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = arguments.bind(*args, **kwargs)
            sample = given.arguments["sample"]
            height, width = sample.shape[-2:]
            size = control_size((height, width), side)
            if size == (height, width):
                return original(*args, **kwargs)
            given.arguments["sample"] = F.interpolate(sample, size, mode="nearest")
            image = given.arguments["controlnet_cond"]
            several = isinstance(image, (list, tuple))
            given.arguments["controlnet_cond"] = [_image(i, size) for i in image] if several else _image(image, size)
            return original(*given.args, **given.kwargs)

        return forward

    return replace_forward(controlnet, wrapper)


def _image(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image, [n * _PIXELS for n in size], mode="bilinear", antialias=True)
