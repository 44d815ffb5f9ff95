"""What is done with attention maps: token values to pictures, smoothing, percentile masks, connected regions, boxes.

Everything is plain torch; definitions are those of numpy and scipy (`percentile`, `ndimage.gaussian_filter`,
`ndimage.label`), which the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Left, top, right, bottom as fractions of width and height; right and bottom lie behind the last cell."""

    left: float
    top: float
    right: float
    bottom: float

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels, whole pixels that touch the box."""
        return (
            int(self.left * width),
            int(self.top * height),
            ceil(round(self.right * width, 6)),  # a fraction of whole cells may come out a hair too large
            ceil(round(self.bottom * height, 6)),
        )


def to_image(
    values: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    mode: Literal["nearest", "bilinear", "bicubic"] = "bilinear",
) -> Tensor:
    """Values of tokens [..., rows * columns] as pictures [..., height, width], cell centres aligned."""
    if values.shape[-1] != grid[0] * grid[1]:
        raise ValueError(f"to_image: {values.shape[-1]} values are not a grid of {grid[0]} x {grid[1]}.")
    lead = values.shape[:-1]
    cells = values.reshape(-1, 1, *grid)
    out = (
        F.interpolate(cells, size) if mode == "nearest" else F.interpolate(cells, size, mode=mode, align_corners=False)
    )
    return out.reshape(*lead, *size)


def gaussian(image: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Gaussian smoothing of [..., H, W], mirrored at the border with the edge repeated (scipy's "reflect")."""
    if sigma <= 0:
        raise ValueError(f"gaussian: sigma={sigma} must be positive.")
    radius = int(truncate * sigma + 0.5)
    place = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    weight = torch.exp(-0.5 * (place / sigma) ** 2)
    weight = weight / weight.sum()
    for axis in (-2, -1):
        moved = image.movedim(axis, -1)
        index = torch.arange(-radius, moved.shape[-1] + radius, device=image.device)
        period = 2 * moved.shape[-1]
        index = index % period
        index = torch.minimum(index, period - 1 - index)
        image = moved[..., index].unfold(-1, 2 * radius + 1, 1) @ weight
        image = image.movedim(-1, axis)
    return image


def above(image: Tensor, percentile: float) -> Tensor:
    """Bool like image [..., H, W]: values at or above the percentile of their picture (linear between values)."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"above: percentile={percentile} must lie between 0 and 100.")
    flat = image.flatten(-2)
    limit = torch.quantile(flat.float(), percentile / 100, dim=-1, keepdim=True)
    return (flat.float() >= limit).unflatten(-1, image.shape[-2:])


def regions(mask: Tensor) -> Tensor:
    """Numbers of 4-connected regions of a mask [H, W], 0 outside, from 1 in raster order of their first cells."""
    if mask.dim() != 2:
        raise ValueError(f"regions: mask of shape {tuple(mask.shape)} must be [height, width].")
    inside = mask.bool()
    far = mask.numel()
    label = torch.where(inside, torch.arange(far, device=mask.device).reshape(mask.shape), far)
    while True:  # every cell takes the least label around it until nothing moves
        wide = F.pad(label[None, None].double(), (1, 1, 1, 1), value=float(far))[0, 0].long()
        around = torch.stack([wide[1:-1, 1:-1], wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]])
        new = torch.where(inside, around.amin(0), far)
        new = torch.where(
            inside, torch.cat([new.flatten(), new.new_tensor([far])])[new.flatten()].reshape(new.shape), far
        )
        if torch.equal(new, label):
            break
        label = new
    first = torch.unique(label[inside])  # sorted: raster order of the first cells
    return torch.where(inside, torch.searchsorted(first, label.contiguous()) + 1, 0)


def boxes(labels: Tensor) -> list[Box]:
    """The box around each region of `regions`, in order of its number."""
    height, width = labels.shape
    found = []
    for number in range(1, int(labels.max()) + 1 if labels.numel() else 1):
        row, column = (labels == number).nonzero(as_tuple=True)
        found.append(
            Box(
                int(column.min()) / width,
                int(row.min()) / height,
                (int(column.max()) + 1) / width,
                (int(row.max()) + 1) / height,
            )
        )
    return found
