"""Rotary tables of pooled cells."""

from __future__ import annotations

import pytest
import torch

from glocal.models.generation.video_dit import rotary_table
from glocal.nn.blocks.rotary import cell_centres


def test_cells_lie_at_their_centres() -> None:
    """A table made at the coordinates k i + (k - 1) / 2 themselves."""
    axes, stride, dim = (3, 7, 10), (1, 2, 4), 24
    cos, sin = rotary_table(axes, dim, 100.0, None, torch.device("cpu")).unbind(0)
    found = cell_centres((cos, sin), axes, stride)
    side = (dim // 2 - dim // 8) // 2
    places = [k * torch.arange(-(-n // k)) + (k - 1) / 2 for n, k in zip(axes, stride, strict=True)]
    angles = []
    for axis, count in enumerate((dim // 2 - 2 * side, side, side)):
        grid = torch.meshgrid(*places, indexing="ij")[axis].flatten()
        angles.append(grid[:, None] * 100.0 ** -(torch.arange(count) / count))
    wanted = torch.cat(angles, 1)
    assert found[0].shape == (3 * 4 * 3, 12)
    torch.testing.assert_close(found[0], wanted.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], wanted.sin(), rtol=0, atol=1e-5)


def test_a_cell_of_one_token_is_the_token() -> None:
    axes = (2, 3, 4)
    cos, sin = rotary_table(axes, 12, 100.0, None, torch.device("cpu")).unbind(0)
    for mine, theirs in zip(cell_centres((cos, sin), axes, (1, 1, 1)), (cos, sin), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_an_axis_of_one_token_turns_nothing() -> None:
    cos, sin = rotary_table((1, 1, 4), 12, 100.0, None, torch.device("cpu")).unbind(0)
    found = cell_centres((cos, sin), (1, 1, 4), (1, 4, 2))
    assert torch.equal(found[0][:, :3], torch.ones(2, 3))  # channels of time and rows


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a table of 5 tokens fills no grid of \(2, 3\); legal: 6"):
        cell_centres((torch.ones(5, 2), torch.zeros(5, 2)), (2, 3), (1, 2))
