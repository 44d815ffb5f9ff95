"""Pictures with labels: procedural scenes with a question to answer, folders of images, rows of a `datasets` set.

Everything is an indexed source of (image, target) pairs: image uint8 [3, H, W], target a class, or a map [H, W] of
classes for segmentation (255 is left out of losses and scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.data.objects import SHAPES, TEXTURES, Layouts, SceneSpec, draw_layouts
from glocal.data.render import render

IGNORED = 255  # a target that counts nowhere
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BATCH = 64  # scenes painted at once


class Labelled(Protocol):
    """A source of pairs. classes: their names. segmentation: whether targets are maps."""

    classes: tuple[str, ...]
    segmentation: bool

    def __len__(self) -> int:
        """Number of pairs."""
        ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index: int64 [B] -> images uint8 [B, 3, H, W], targets int64 [B] or [B, H, W]."""
        ...


class Stored:
    """Pairs held in memory, on any device."""

    def __init__(self, images: Tensor, targets: Tensor, classes: Sequence[str]) -> None:
        if len(images) != len(targets):
            raise ValueError(f"Stored: {len(images)} images and {len(targets)} targets; there must be as many.")
        self.images, self.targets, self.classes = images, targets, tuple(classes)
        self.segmentation = targets.dim() == 3

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Labelled`."""
        index = index.to(self.images.device)
        return self.images[index], self.targets[index].long()


def scene_relations(count: int, size: int = 112, seed: int = 0, device: torch.device | str = "cpu") -> Stored:
    """Scenes of two objects; the class is the texture of the larger one, and whether both have one colour: 8 classes.

    The texture is seen in a few pixels, the relation only by comparing two places. Half of the scenes have one colour.
    """
    spec = SceneSpec(frames=1, height=size, width=size, objects=(2, 2), radius=(0.18, 0.25), pan=(0.0, 0.0))
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for start in range(0, count, _BATCH):
        layouts = draw_layouts(min(_BATCH, count - start), generator, spec)
        layouts = _coloured(_apart(layouts, generator), generator)
        same = layouts.colour[:, -1] == layouts.colour[:, -2]
        targets.append(2 * layouts.texture[:, -1] + same.long())
        images.append(_painted(layouts, device)[0])
    names = [f"{texture}, {kind}" for texture in TEXTURES for kind in ("two colours", "one colour")]
    return Stored(torch.cat(images), torch.cat(targets).to(device), names)


def scene_masks(count: int, size: int = 512, seed: int = 0, device: torch.device | str = "cpu") -> Stored:
    """Scenes of two to five objects; every pixel has the shape of the object it shows, or is background: 7 classes."""
    spec = SceneSpec(frames=1, height=size, width=size, radius=(0.08, 0.2), pan=(0.0, 0.0))
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for start in range(0, count, _BATCH):
        layouts = draw_layouts(min(_BATCH, count - start), generator, spec)
        painted, owner = _painted(layouts, device)
        shape = layouts.shape.to(device).gather(1, owner.clamp(min=0).flatten(1)).reshape(owner.shape)
        targets.append(torch.where(owner < 0, 0, shape + 1).to(torch.uint8))
        images.append(painted)
    return Stored(torch.cat(images), torch.cat(targets), ("background", *SHAPES))


def _apart(layouts: Layouts, generator: torch.Generator) -> Layouts:
    """The two objects of each scene in opposite halves, so that none hides the other; the first has 0.6 of its size."""
    size = float(layouts.spec.side)
    count = len(layouts)
    angle = torch.rand(count, generator=generator) * 2 * torch.pi
    reach = size * (0.24 + 0.06 * torch.rand(count, generator=generator))
    offset = torch.stack([angle.cos(), angle.sin()], -1) * reach[:, None]
    middle = layouts.middle.clone()
    middle[:, -1], middle[:, -2] = size / 2 + offset, size / 2 - offset
    radius = layouts.radius.clone()
    radius[:, -2] *= 0.6
    return replace(layouts, middle=middle, radius=radius)


def _coloured(layouts: Layouts, generator: torch.Generator) -> Layouts:
    """Half of the scenes with one colour for both objects, half with two."""
    colours = 8
    same = torch.rand(len(layouts), generator=generator) < 0.5
    step = torch.randint(1, colours, (len(layouts),), generator=generator)
    colour = layouts.colour.clone()
    colour[:, -1] = torch.where(same, colour[:, -2], (colour[:, -2] + step) % colours)
    return replace(layouts, colour=colour)


def _painted(layouts: Layouts, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """uint8 [B, 3, H, W] and the object that each pixel shows, int64 [B, H, W], -1 for the background."""
    found = render(layouts.to(device), torch.zeros(1, device=device))
    return (found.video[:, 0] * 255).round().to(torch.uint8), found.owner[:, 0].long()


class ImageFolder:
    """Images in folders named after their class: path/CLASS/*.png (jpg, webp, bmp).

    size: px of the square that images are resized to (shorter side) and cropped to. Needs Pillow.
    """

    segmentation = False

    def __init__(self, path: str | Path, size: int = 224) -> None:
        self.root, self.size = Path(path), size
        if not self.root.is_dir():
            raise FileNotFoundError(2, "no such folder of images", str(path))
        folders = sorted(folder for folder in self.root.iterdir() if folder.is_dir())
        self.classes = tuple(folder.name for folder in folders)
        self.files = [
            (file, number)
            for number, folder in enumerate(folders)
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in IMAGES
        ]
        if not self.files:
            raise ValueError(
                f"ImageFolder: {str(path)!r} holds no images in folders of classes; legal: CLASS/name.png, with one of "
                f"{', '.join(IMAGES)}."
            )

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Labelled`. Raises ModuleNotFoundError without Pillow."""
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("reading images needs Pillow: pip install 'glocal[train]'", name="PIL") from error

        images = []
        for i in index.tolist():
            with Image.open(self.files[i][0]) as opened:
                images.append(_square(np.asarray(opened.convert("RGB")), self.size))
        return torch.stack(images), torch.tensor([self.files[i][1] for i in index.tolist()])


class Rows:
    """Rows of a set as the package `datasets` has them, or any sequence of dicts with a picture and a label.

    image, label: names of the columns; a label is a number, or a picture of class numbers for segmentation.
    """

    def __init__(self, rows: Any, classes: Sequence[str], size: int = 224, image: str = "image", label: str = "label"):
        if len(rows) == 0:
            raise ValueError("Rows: the set has no rows.")
        missing = [name for name in (image, label) if name not in rows[0]]
        if missing:
            raise ValueError(f"Rows: no column {missing[0]!r}; there are {', '.join(map(repr, rows[0]))}.")
        self.rows, self.classes, self.size, self.columns = rows, tuple(classes), size, (image, label)
        self.segmentation = np.asarray(rows[0][label]).ndim >= 2

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Labelled`."""
        chosen = [self.rows[i] for i in index.tolist()]
        image, label = self.columns
        images = torch.stack([_square(_rgb(row[image]), self.size) for row in chosen])
        if not self.segmentation:
            return images, torch.tensor([int(row[label]) for row in chosen])
        return images, torch.stack([_square(np.asarray(row[label]), self.size, nearest=True) for row in chosen]).long()


def _rgb(picture: Any) -> np.ndarray:
    return np.asarray(picture.convert("RGB")) if hasattr(picture, "convert") else np.asarray(picture)


def _square(pixels: np.ndarray, size: int, nearest: bool = False) -> Tensor:
    """[h, w, 3] or [h, w] -> the middle square, uint8 [3, size, size] or [size, size]."""
    picture = torch.from_numpy(np.array(pixels, copy=True))
    picture = picture[None] if picture.dim() == 2 else picture.permute(2, 0, 1)[:3]
    height, width = picture.shape[1:]
    scale = size / min(height, width)
    sides = (max(size, round(height * scale)), max(size, round(width * scale)))
    options: dict[str, Any] = {"mode": "nearest"} if nearest else {"mode": "bilinear", "antialias": True}
    resized = F.interpolate(picture[None].float(), size=sides, **options)[0].round().clamp(0, 255).to(torch.uint8)
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    square = resized[:, top : top + size, left : left + size]
    return square[0] if nearest else square
