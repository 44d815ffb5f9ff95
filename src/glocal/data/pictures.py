"""Procedural still pictures: scenes of one frame whose objects keep apart, so that a caption can say where each is.

The same layout is painted at any size (`at_side`): it is the ground truth of a high-resolution picture of its caption.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glocal.data.objects import Layouts, SceneSpec, draw_layouts
from glocal.data.render import render

_TRIES = 12


def picture_spec(side: int = 64, objects: tuple[int, int] = (1, 3)) -> SceneSpec:
    """Scenes of one frame of side x side px in which nothing moves."""
    return SceneSpec(
        frames=1,
        height=side,
        width=side,
        objects=objects,
        radius=(0.14, 0.21),
        travel=(0.0, 0.0),
        pan=(0.0, 0.0),
        bounce=0.0,
    )


def draw_pictures(count: int, generator: torch.Generator, spec: SceneSpec | None = None) -> Layouts:
    """`count` layouts from `generator`; objects stand at the best parted of twelve drawn sets of places."""
    spec = picture_spec() if spec is None else spec
    layouts = draw_layouts(count, generator, spec)
    room = layouts.present.shape[1]
    size = torch.tensor([float(spec.width), float(spec.height)])
    inset = (layouts.radius * 1.05)[None, ..., None].minimum(size * 0.5)  # whole objects
    places = inset + (size - 2 * inset) * torch.rand(_TRIES, count, room, 2, generator=generator)
    apart = (places[..., :, None, :] - places[..., None, :, :]).norm(dim=-1)  # [tries, B, K, K]
    apart = apart - layouts.radius[:, :, None] - layouts.radius[:, None, :]
    both = layouts.present[:, :, None] & layouts.present[:, None, :] & ~torch.eye(room, dtype=torch.bool)
    best = torch.where(both, apart, torch.inf).flatten(2).amin(-1).argmax(0)  # [B]
    return replace(layouts, middle=places[best, torch.arange(count)])


def at_side(layouts: Layouts, side: int) -> Layouts:
    """The same pictures in side x side px: lengths grow with it."""
    factor = side / layouts.spec.side
    return replace(
        layouts,
        spec=replace(layouts.spec, height=side, width=side),
        radius=layouts.radius * factor,
        middle=layouts.middle * factor,
        velocity=layouts.velocity * factor,
        period=layouts.period * factor,
        shift=layouts.shift * factor,
        wave=torch.cat([layouts.wave[:, :2] / factor, layouts.wave[:, 2:]], 1),
    )


def paint(layouts: Layouts) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1]."""
    return render(layouts).video[:, 0]
