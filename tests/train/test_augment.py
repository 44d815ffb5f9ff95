"""Changes of training images."""

from __future__ import annotations

import pytest
import torch

from glocal.train.augment import flip_and_shift, mixed


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_maps_move_with_their_images() -> None:
    targets = torch.arange(2 * 9 * 7).reshape(2, 9, 7)
    images = targets[:, None].expand(-1, 3, -1, -1).float()
    moved, along = flip_and_shift(images, targets, 3, draws(4))
    assert torch.equal(moved[:, 0].long(), along) and not torch.equal(along, targets)


def test_without_a_shift_images_are_mirrored_or_not() -> None:
    images = torch.arange(8 * 3 * 4 * 5).reshape(8, 3, 4, 5).float()
    moved, labels = flip_and_shift(images, torch.arange(8), 0, draws())
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(moved, images, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(moved, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True)) and any(mirrored) and any(kept)
    assert torch.equal(labels, torch.arange(8))


@pytest.mark.parametrize("rates", [(0.8, 0.0, 0.1), (0.0, 1.0, 0.1), (0.0, 0.0, 0.0)])
def test_mixed_targets_are_probabilities_of_what_the_image_shows(rates: tuple[float, float, float]) -> None:
    labels = torch.tensor([0, 1, 2, 1])
    images = labels[:, None, None, None].expand(-1, 3, 20, 20).float()
    for seed in range(4):
        found, soft = mixed(images, labels, 3, rates, draws(seed))
        assert torch.allclose(soft.sum(1), torch.ones(4))
        smoothing = rates[2]
        hard = (soft - smoothing / 3) / (1 - smoothing)
        # the mean of an image is the mean of the classes it is made of
        assert torch.allclose(found.mean((1, 2, 3)), hard @ torch.arange(3.0), atol=1e-5)
