"""Whether a guest can run here, from the metadata of installed packages and the device: nothing is imported."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

Needs = tuple[tuple[str, str], ...]


def lacking(packages: Needs, compute: tuple[int, ...], device: str) -> str | None:
    """What is missing, in words with the command that mends it; None if nothing.

    packages: (distribution, least version). compute: major compute capabilities that the guest has kernels for.
    """
    for name, least in packages:
        found = _installed(name)
        if found is None:
            return f"{name} is not installed (pip install --pre '{name}>={least}')"
        if _numbers(found) < _numbers(least):
            return f"{name} {found} is older than {least} (pip install --pre '{name}>={least}')"
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major not in compute:
            legal = ", ".join(f"{m}.x" for m in compute)
            return f"compute capability {major}.{minor} (legal: {legal})"
    return None


@lru_cache(maxsize=64)
def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


_STAGES = {"dev": 0, "a": 1, "b": 2, "rc": 3, "": 4}


def _numbers(text: str) -> tuple[tuple[int, ...], int, int]:
    """("4.0.0b36") -> ((4, 0, 0), 2, 36): the release, the stage of a pre-release and its number."""
    found = re.match(r"(\d+(?:\.\d+)*)\.?(dev|a|b|rc|)(\d*)", text)
    if found is None:
        return (), 0, 0
    release, stage, number = found.groups()
    return tuple(int(part) for part in release.split(".")), _STAGES[stage], int(number) if stage and number else 0


def on(t: Tensor) -> AbstractContextManager[object]:
    """The device of `t` as the current one: guests launch where torch stands."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
