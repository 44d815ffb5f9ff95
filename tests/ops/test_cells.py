from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.ops import cells


def naive(pixels: Tensor, centres: Tensor, scale: float, border: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and reads, pixel by pixel."""
    b, rows, columns, count, _ = pixels.shape
    weights = torch.zeros(b, rows, columns, count, 9, dtype=pixels.dtype)
    total, mass = torch.zeros_like(centres), torch.zeros(b, rows, columns, dtype=pixels.dtype)
    read = torch.zeros_like(pixels)
    for i in range(b):
        for y in range(rows):
            for x in range(columns):
                places = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                inside = [0 <= a < rows and 0 <= d < columns for a, d in places]
                for p in range(count):
                    pixel = pixels[i, y, x, p]
                    outside = 0.0 if border == "absent" else -torch.inf
                    logits = torch.stack([
                        pixel @ centres[i, a, d] * scale if here else torch.tensor(outside, dtype=pixels.dtype)
                        for (a, d), here in zip(places, inside, strict=True)
                    ])  # fmt: skip
                    weights[i, y, x, p] = logits.softmax(0)
                    for k, ((a, d), here) in enumerate(zip(places, inside, strict=True)):
                        if here:
                            total[i, a, d] += weights[i, y, x, p, k] * pixel
                            mass[i, a, d] += weights[i, y, x, p, k]
                            read[i, y, x, p] += weights[i, y, x, p, k] * centres[i, a, d]
    return weights, total / mass[..., None], read


@pytest.mark.parametrize("border", ["absent", "mask"])
def test_equals_its_definition(border, generator: torch.Generator) -> None:
    pixels = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    centres = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)
    weights, means, read = naive(pixels, centres, 0.3, border)
    ours = cells.affinity(pixels, centres, 0.3, border=border)
    assert torch.allclose(ours, weights) and torch.allclose(ours.sum(-1), torch.ones(2, 2, 3, 4).double())
    assert torch.allclose(cells.scatter(pixels, ours), means)
    assert torch.allclose(cells.gather(centres, ours), read)


def test_scatter_is_the_normalised_adjoint_of_gather(generator: torch.Generator) -> None:
    weights = torch.rand(1, 3, 4, 6, 9, generator=generator, dtype=torch.float64)
    pixels = torch.randn(1, 3, 4, 6, 5, generator=generator, dtype=torch.float64)
    centres = torch.zeros(1, 3, 4, 5, dtype=torch.float64).requires_grad_()
    (adjoint,) = torch.autograd.grad(cells.gather(centres, weights), centres, pixels)
    ones = torch.ones_like(pixels[..., :1])
    (mass,) = torch.autograd.grad(cells.gather(centres[..., :1], weights), centres, ones)
    assert torch.allclose(cells.scatter(pixels, weights), adjoint / mass[..., :1])


def test_a_constant_map_has_constant_centres() -> None:
    pixels, centres = torch.ones(1, 4, 4, 3, 2), torch.ones(1, 4, 4, 2)
    weights = cells.affinity(pixels, centres, 1.0)
    assert torch.allclose(cells.scatter(pixels, weights), centres)
    assert torch.allclose(weights[:, 1:3, 1:3], torch.full((1, 2, 2, 3, 9), 1 / 9))


def test_refuses_in_words() -> None:
    pixels, centres = torch.zeros(1, 2, 2, 3, 4), torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match="border='zero'; legal: 'absent', 'mask'"):
        cells.affinity(pixels, centres, 1.0, border="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"centres of shape \(1, 2, 4\) \[B, rows, columns, C\]"):
        cells.affinity(pixels, centres[:, 0], 1.0)
    with pytest.raises(ValueError, match="with 9, 25, ... neighbours"):
        cells.gather(centres, torch.zeros(1, 2, 2, 3, 8))
    with pytest.raises(ValueError, match="reach=-1 must be at least 0"):
        cells.affinity(pixels, centres, 1.0, reach=-1)
