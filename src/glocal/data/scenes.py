"""Procedural moving scenes: textured objects with depth, occlusion, motion and camera pan, fixed by a seed.

`make_scene` gives one scene with everything known about it; training draws layouts in batches with
`glocal.data.objects.draw_layouts` and paints only the frames it needs with `glocal.data.render.render`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.data.objects import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PANS,
    SHAPES,
    TEXTURES,
    Layouts,
    SceneSpec,
    draw_layouts,
)
from glocal.data.render import Rendered, render
from glocal.data.words import ObjectAttributes, Question, caption, questions


@dataclass(frozen=True)
class Scene:
    """One moving scene of K objects (far to near) and T frames.

    video [T, 3, H, W] in [0, 1]; masks [T, K, H, W] bool, the visible part of each object; boxes [T, K, 4] long as
    (left, top, right, bottom) px of the visible part, right and bottom exclusive, all 0 where nothing is visible;
    depth [T, H, W] in (0, 1], 1 is the background; centres [T, K, 2] as (x, y) px.
    """

    video: Tensor
    masks: Tensor
    boxes: Tensor
    depth: Tensor
    centres: Tensor
    objects: tuple[ObjectAttributes, ...]
    background: str
    pan: str
    caption: str
    questions: tuple[Question, ...]


def boxes_of(masks: Tensor) -> Tensor:
    """Tight boxes of masks: [..., H, W] bool -> [..., 4] long (left, top, right, bottom), empty masks give zeros."""
    across, down = masks.any(-2), masks.any(-1)  # [..., W], [..., H]
    width, height = across.shape[-1], down.shape[-1]
    left, top = across.int().argmax(-1), down.int().argmax(-1)
    right, bottom = width - across.flip(-1).int().argmax(-1), height - down.flip(-1).int().argmax(-1)
    return torch.stack([left, top, right, bottom], -1) * masks.flatten(-2).any(-1)[..., None]


def describe(layouts: Layouts, rendered: Rendered, index: int) -> Scene:
    """Everything known about scene `index` of a rendered batch."""
    numbers = layouts.present[index].nonzero().flatten().tolist()
    objects = tuple(
        ObjectAttributes(
            number=place,
            shape=SHAPES[int(layouts.shape[index, k])],
            colour=list(COLOURS)[int(layouts.colour[index, k])],
            texture=TEXTURES[int(layouts.texture[index, k])],
            direction=DIRECTIONS[int(layouts.direction[index, k])],
            radius=float(layouts.radius[index, k]),
            distance=float(layouts.distance[index, k]),
        )
        for place, k in enumerate(numbers)
    )
    masks = torch.stack([rendered.owner[index] == k for k in numbers], 1)  # [T, K, H, W]
    background = list(BACKGROUNDS)[int(layouts.background[index])]
    pan = PANS[int(layouts.pan[index])]
    used = {o.colour for o in objects}
    absent = next((name for name in COLOURS if name not in used), "white")
    return Scene(
        video=rendered.video[index],
        masks=masks,
        boxes=boxes_of(masks),
        depth=rendered.depth[index],
        centres=rendered.centres[index][:, numbers],
        objects=objects,
        background=background,
        pan=pan,
        caption=caption(objects, background, pan),
        questions=questions(objects, pan, absent),
    )


def make_scene(seed: int, spec: SceneSpec | None = None) -> Scene:
    """The scene of `seed`: same seed and spec, same bits."""
    layouts = draw_layouts(1, torch.Generator().manual_seed(seed), spec)
    return describe(layouts, render(layouts), 0)


def make_scenes(count: int, seed: int, spec: SceneSpec | None = None) -> tuple[Scene, ...]:
    """`count` scenes painted in one batch from one seed."""
    layouts = draw_layouts(count, torch.Generator().manual_seed(seed), spec)
    rendered = render(layouts)
    return tuple(describe(layouts, rendered, index) for index in range(count))
