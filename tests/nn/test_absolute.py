from __future__ import annotations

import pytest
import torch

from glocal.nn.blocks.absolute import resize_positions, sincos_positions


def test_columns_come_first() -> None:
    table = sincos_positions(8, 2, 3).reshape(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4]) and torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert table[1, 2].tolist() == pytest.approx(
        [0.9092974, 0.0199987, -0.4161468, 0.9998, 0.8414710, 0.0099998, 0.5403023, 0.99995], abs=1e-6
    )


def test_only_places_are_resized(generator: torch.Generator) -> None:
    table = torch.randn(1, 1 + 9, 4, generator=generator)
    assert resize_positions(table, 3, (3, 3), extra=1) is table
    other = resize_positions(table, 3, (2, 5), extra=1)
    assert other.shape == (1, 11, 4) and torch.equal(other[:, 0], table[:, 0])


def test_refuses_odd_channels() -> None:
    with pytest.raises(ValueError, match="dim=6 must be a multiple of 4; nearest: 8"):
        sincos_positions(6, 2, 2)
