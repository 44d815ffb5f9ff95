"""Changes of training images, drawn from one generator: flips, shifts, mixup (1710.09412) and cutmix (1905.04899)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def flip_and_shift(images: Tensor, targets: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each sample mirrored with probability 1/2 and moved by up to `most` px, borders repeated.

    images: [B, 3, H, W]; targets: [B], or maps [B, H, W] that move along.
    """
    count, device = len(images), images.device
    mirrored = torch.rand(count, generator=generator) < 0.5
    moves = torch.randint(-most, most + 1, (2, count), generator=generator) if most else torch.zeros(2, count).long()
    height, width = images.shape[2:]
    row = (torch.arange(height)[None] + moves[0][:, None]).clamp(0, height - 1)  # [B, H]
    column = (torch.arange(width)[None] + moves[1][:, None]).clamp(0, width - 1)
    column = torch.where(mirrored[:, None], column.flip(1), column)
    sample = torch.arange(count, device=device)[:, None, None]
    row, column = row.to(device)[:, :, None], column.to(device)[:, None, :]
    moved = images.permute(0, 2, 3, 1)[sample, row, column].permute(0, 3, 1, 2)
    return moved, targets[sample, row, column] if targets.dim() == 3 else targets


def mixed(
    images: Tensor, targets: Tensor, classes: int, rates: tuple[float, float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix, one of the two drawn for a batch, and label smoothing.

    images: float [B, 3, H, W]; targets: int64 [B]. rates: (mixup alpha, cutmix alpha, smoothing), 0 leaves one out.
    Returns the images and targets as probabilities [B, classes].
    """
    mixup, cutmix, smoothing = rates
    soft = F.one_hot(targets, classes).float() * (1 - smoothing) + smoothing / classes
    kinds = [kind for kind, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0]
    if not kinds:
        return images, soft
    kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
    share = _beta(mixup if kind == "mixup" else cutmix, generator)
    other = torch.randperm(len(images), generator=generator).to(images.device)
    if kind == "mixup":
        return torch.lerp(images[other], images, share), torch.lerp(soft[other], soft, share)
    height, width = images.shape[2:]
    sides = [round(side * (1 - share) ** 0.5) for side in (height, width)]
    top, left = (
        int(torch.randint(length - side + 1, (), generator=generator))
        for length, side in zip((height, width), sides, strict=True)
    )
    images = images.clone()
    patch = (slice(None), slice(None), slice(top, top + sides[0]), slice(left, left + sides[1]))
    images[patch] = images[other][patch]
    kept = 1 - sides[0] * sides[1] / (height * width)
    return images, torch.lerp(soft[other], soft, kept)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """One number of a beta distribution with equal parameters."""
    first, second = torch._standard_gamma(torch.full((2,), alpha), generator=generator).tolist()
    return first / max(first + second, 1e-12)
