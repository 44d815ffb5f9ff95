"""A tiny video model whose every part counts, and methods that act at one point each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt import Method, RunState, Site, SiteCall
from glocal.adapt.records import Core
from glocal.models.generation.video_dit import VideoDiT, VideoDiTConfig

FIELDS = (("shape", ("disc", "square")),)


def tiny(seed: int = 0) -> VideoDiT:
    """2 layers, 2 heads; no parameter is zero, so that every change shows in the output."""
    torch.manual_seed(seed)
    model = VideoDiT(VideoDiTConfig(dim=24, layers=2, heads=2, hidden=16, patch=2, fields=FIELDS)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def model() -> VideoDiT:
    return tiny()


@pytest.fixture
def clip(generator: torch.Generator) -> Tensor:
    """[1, 2, 3, 6, 8]: a canvas of 2 x 3 x 4 tokens."""
    return torch.randn(1, 2, 3, 6, 8, generator=generator)


class AtCore(Method):
    """Doubles what an attention gives."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self.calls: list[SiteCall] = []

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        self.calls.append(call)
        return inner(q, k, v, call) * self.factor


class AtModule(Method):
    """Halves what an attention module gives."""

    def module(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        return lambda *args, **kwargs: original(*args, **kwargs) / 2


class AtLayer(Method):
    """Leaves every layer out."""

    def layer(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        return lambda hidden, *args, **kwargs: hidden


class AtForward(Method):
    """Plays the clip backwards on the way in and out."""

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        return lambda x, *args, **kwargs: original(x.flip(1), *args, **kwargs).flip(1)


class AtStep(Method):
    """Acts where no host here lets it."""

    def step(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        return original


EVERY = (AtCore, AtModule, AtLayer, AtForward)
