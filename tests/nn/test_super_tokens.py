from __future__ import annotations

import pytest
import torch

from glocal.nn.super_tokens import SuperTokenAttention
from glocal.testing.layer_tester import LayerTester


class Clustered(LayerTester):
    """The assignment has no gradient, so finite differences of the input do not agree with it."""

    shapes = ((2, 7, 10, 8), (1, 3, 1, 8))
    gradcheck = False


class TestSuperTokens(Clustered):
    def make(self) -> SuperTokenAttention:
        return SuperTokenAttention(8, 2, cell=(4, 2), iterations=2)

    def bad(self):
        return [
            (lambda: SuperTokenAttention(8, 2, cell=0), "cell=0, iterations=1; both must be at least 1"),
            (lambda: SuperTokenAttention(8, 3), "heads=3 must divide dim=8"),
            (lambda: SuperTokenAttention(8, 2, refine="mlp"), "refine='mlp'; legal: 'attention', 'convolution'"),  # type: ignore[arg-type]
            (lambda: SuperTokenAttention(8, 2, cell=1).associate(torch.zeros(1, 4, 4, 8)), "cell=1 forms no super"),
        ]


class TestConvolutions(Clustered):
    def make(self) -> SuperTokenAttention:
        return SuperTokenAttention(8, 2, cell=3, refine="convolution")


class TestDense(LayerTester):
    shapes = ((2, 7, 10, 8), (1, 3, 1, 8))

    def make(self) -> SuperTokenAttention:
        return SuperTokenAttention(8, 2, cell=1)


def test_mirrored_input_gives_mirrored_output(generator: torch.Generator) -> None:
    layer, x = SuperTokenAttention(8, 2, cell=4), torch.randn(1, 8, 12, 8, generator=generator)
    assert torch.allclose(layer(x.flip(2)), layer(x).flip(2), atol=1e-5)


def test_without_refinement_a_constant_map_keeps_its_inside() -> None:
    layer, x = SuperTokenAttention(8, 2, cell=2, refine="none"), torch.ones(1, 8, 8, 8)
    out = layer(x)
    assert torch.allclose(out[:, 2:6, 2:6], x[:, 2:6, 2:6], atol=1e-5) and bool((out[:, 0] < 1).all())


@pytest.mark.parametrize("cell", [2, (3, 4)])
def test_association_is_what_ran(cell, generator: torch.Generator) -> None:
    layer = SuperTokenAttention(8, 2, cell=cell, iterations=2)
    found = layer.associate(torch.randn(2, 7, 9, 8, generator=generator))
    h, w = layer.cell
    rows, columns = -(-7 // h), -(-9 // w)
    assert found.affinity.shape == (2, rows * columns, h * w, 9) and found.tokens.shape == (2, rows, columns, 8)
    assert torch.allclose(found.affinity.sum(-1), torch.ones(2, rows * columns, h * w))
