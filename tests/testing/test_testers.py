"""The base testers on patterns that have an oracle, and on code that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from glocal.canvas import Canvas, Coords, Layout
from glocal.patterns import Neighborhood, RadialBlocks, StridedShards, Windows
from glocal.patterns.base import Pattern
from glocal.testing import Example, LayerTester, PatternTester, oracle


def windowed(shape: tuple[int, ...], window, stride: Any = 1, dilation: Any = 1, causal: Any = False) -> Example:
    per_axis = [v if isinstance(v, tuple) else (v,) * len(shape) for v in (window, stride, dilation, causal)]
    rules = [oracle.neighborhood(*axis) for axis in zip(shape, *per_axis, strict=True)]
    return Example(Neighborhood(window, stride, dilation, causal), Canvas(shape), oracle.axiswise(shape, rules))


class TestNeighborhood(PatternTester):
    def examples(self) -> Sequence[Example]:
        return [
            windowed((5, 7), 3),
            windowed((23,), 6, 2, 3, True),
            windowed((9, 5), (4, 3), (3, 2), (2, 1), (False, True)),
            windowed((3, 5, 4), (2, 3, 4), (1, 3, 2)),
            windowed((1, 1), 1),
        ]

    def bad(self):
        layout = Layout.of(Canvas((5, 7)))
        return [
            (lambda: Neighborhood(3, 4), "stride=4 on axis 0 must lie between 1 and the window 3"),
            (lambda: Neighborhood(6).check(layout), "window=6 with dilation=1 does not fit axis 0 of length 5"),
            (lambda: Neighborhood((3, 3, 3)).check(layout), "has 3 entries, but the grid has 2 axes"),
        ]


class TestStridedShards(PatternTester):
    def examples(self) -> Sequence[Example]:
        masks = [oracle.relation((22,), (22,), oracle.strided_shard(4, 1, 3, 3, head)) for head in range(3)]
        return [Example(StridedShards(4, 1, 3, 3), Canvas((22,)), torch.stack(masks))]


class TestRadialBlocks(PatternTester):
    def examples(self) -> Sequence[Example]:
        found = []
        models: list[tuple[Literal["wan", "hunyuan"], int]] = [("wan", 0), ("hunyuan", 16)]
        for model, text in models:
            blocks = oracle.radial_blocks(5, 32, 16, 0.2, sink=model == "wan", text=text)
            tokens = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
            found.append(Example(RadialBlocks(16, 0.2, model), Canvas((5, 32), after=text), tokens))
        return found


class TestWindows(PatternTester):
    def examples(self) -> Sequence[Example]:
        shape = (5, 7)
        seen = oracle.axiswise(shape, [oracle.windowed(2), oracle.windowed(3)])
        return [Example(Windows((2, 3)), Canvas(shape), seen)]


@dataclass(frozen=True)
class Lopsided(Pattern):
    """Its closed form forgets the border shift."""

    def within(self, q: Coords, k: Coords, shape: tuple[int, ...], layout: Layout, head: int | None) -> Tensor:
        return Neighborhood(3).within(q, k, shape, layout, head)

    def terms(self, shape: tuple[int, ...], head: int | None):
        return Neighborhood(3, border="clip").terms(shape, head)


class WrongPattern(PatternTester):
    def examples(self) -> Sequence[Example]:
        seen = oracle.axiswise((9,), [oracle.clipped(1, 1)])
        return [Example(Lopsided(), Canvas((9,)), seen)]


@pytest.mark.parametrize(
    "name",
    ["test_definition_equals_the_oracle", "test_closed_form_equals_the_definition"],
)
def test_a_wrong_pattern_is_found(name: str) -> None:
    with pytest.raises(AssertionError):
        getattr(WrongPattern(), name)()


class Leaky(nn.Module):
    """Mixes samples, forgets a parameter, accepts any width and returns another map."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.zeros(3))
        self.hidden = torch.rand(())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0, keepdim=True))[:, 1:] + self.hidden


class WrongLayer(LayerTester):
    shapes = ((2, 5, 4), (1, 2, 4))

    def make(self) -> nn.Module:
        return Leaky()

    def bad(self):
        return [(lambda: self.make()(torch.zeros(1, 5, 4)), "anything")]


@pytest.mark.parametrize(
    "name",
    [
        "test_forward_keeps_the_shape",
        "test_samples_do_not_mix",
        "test_empty_batch",
        "test_every_parameter_learns",
        "test_state_saves_and_loads",
        "test_refuses_in_words",
    ],
)
def test_a_wrong_layer_is_found(name: str) -> None:
    with pytest.raises(AssertionError):
        getattr(WrongLayer(), name)()
