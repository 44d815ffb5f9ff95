"""Draws what is in a procedural moving scene: a batch of object layouts from one generator.

Everything a scene contains is a handful of numbers (shape, colours, texture, place, velocity, depth, camera pan,
background). Drawing those numbers apart from painting them keeps a scene reproducible from its seed and lets the same
layout be painted at any set of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SHAPES = ("disc", "square", "triangle", "diamond", "ring", "cross")
TEXTURES = ("plain", "striped", "checkered", "noisy")
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
PANS = ("still", "right", "down", "left", "up")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.16, 0.16),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.97, 0.88, 0.20),
    "green": (0.16, 0.66, 0.26),
    "cyan": (0.15, 0.76, 0.82),
    "blue": (0.17, 0.32, 0.88),
    "purple": (0.56, 0.22, 0.76),
    "pink": (0.97, 0.48, 0.72),
}
BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "day": ((0.80, 0.88, 0.95), (0.62, 0.74, 0.86)),
    "sand": ((0.93, 0.88, 0.76), (0.80, 0.72, 0.58)),
    "night": ((0.16, 0.17, 0.27), (0.07, 0.08, 0.14)),
    "mist": ((0.88, 0.88, 0.88), (0.68, 0.70, 0.70)),
}
NOISE_CELLS = 6
"""Cells a side of the value noise that the "noisy" texture interpolates."""


@dataclass(frozen=True)
class SceneSpec:
    """What scenes may contain. Lengths are fractions of the shorter side; speeds are such fractions per clip.

    frames, height, width: size of the clip. objects: fewest and most objects. radius: smallest and largest half-size.
    travel: shortest and longest way of an object during the clip. pan: way of the camera during the clip.
    bounce: probability that an object is reflected at the border instead of leaving.
    """

    frames: int = 16
    height: int = 64
    width: int = 64
    objects: tuple[int, int] = (2, 5)
    radius: tuple[float, float] = (0.12, 0.22)
    travel: tuple[float, float] = (0.2, 0.6)
    pan: tuple[float, float] = (0.1, 0.25)
    bounce: float = 0.5

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a clip needs at least 1; use {name}=1")
        low, high = self.objects
        if not 1 <= low <= high:
            raise ValueError(
                f"objects={self.objects}: need 1 <= fewest <= most; nearest is ({max(1, low)}, {max(1, low, high)})"
            )
        for name in ("radius", "travel", "pan"):
            first, last = getattr(self, name)
            if not 0 <= first <= last:
                raise ValueError(f"{name}={(first, last)}: need 0 <= smallest <= largest; swap or raise them")
        if not 0.0 <= self.bounce <= 1.0:
            raise ValueError(f"bounce={self.bounce}: a probability lies in 0..1")

    @property
    def side(self) -> int:
        """The shorter side in pixels."""
        return min(self.height, self.width)


@dataclass(frozen=True)
class Layouts:
    """A batch of B scenes with room for K objects each, sorted from far (0) to near (K - 1).

    present [B, K] bool; shape, colour, texture, direction [B, K] indices into the tables of this module;
    radius [B, K] px; middle, velocity [B, K, 2] as (x, y) in px and px per frame, at the middle of the clip;
    bounces [B, K] bool; angle, period [B, K] (radians, px) of shape and texture; cells [B, K, C, C] value noise;
    distance [B, K] in (0, 1], 1 is the background; background, pan [B] indices; shift [B, 2] px of pan per frame;
    wave [B, 3] spatial frequencies (x, y; radians per px) and phase of the background.
    """

    spec: SceneSpec
    present: Tensor
    shape: Tensor
    colour: Tensor
    texture: Tensor
    direction: Tensor
    radius: Tensor
    middle: Tensor
    velocity: Tensor
    bounces: Tensor
    angle: Tensor
    period: Tensor
    cells: Tensor
    distance: Tensor
    background: Tensor
    pan: Tensor
    shift: Tensor
    wave: Tensor

    def __len__(self) -> int:
        return self.present.shape[0]

    def to(self, device: torch.device | str) -> Layouts:
        """The same layouts on another device."""
        return Layouts(
            self.spec, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "spec"}
        )


def draw_layouts(count: int, generator: torch.Generator, spec: SceneSpec | None = None) -> Layouts:
    """Draw `count` layouts on the CPU from `generator`; the same state gives the same bits.

    Raises ValueError if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}: draw at least 1 layout")
    spec = SceneSpec() if spec is None else spec
    room = spec.objects[1]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def between(bounds: tuple[float, float], *shape: int) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * uniform(*shape)

    def choice(options: int, *shape: int) -> Tensor:
        return torch.randint(options, shape, generator=generator)

    objects = torch.randint(spec.objects[0], room + 1, (count, 1), generator=generator)
    # Present objects take the near end, so that index K - 1 is always the one in front.
    present = torch.arange(room).flip(0)[None] < objects  # [B, K]
    # Colours differ inside a scene where the palette allows, so that a caption names each object.
    colour = uniform(count, max(room, len(COLOURS))).argsort(1)[:, :room] % len(COLOURS)
    direction = choice(len(DIRECTIONS), count, room)
    heading = (direction + 0.6 * (uniform(count, room) - 0.5)) * (math.pi / 4)
    speed = between(spec.travel, count, room) * spec.side / spec.frames
    radius = between(spec.radius, count, room) * spec.side
    size = torch.tensor([float(spec.width), float(spec.height)])
    inset = (radius[..., None] * 0.8).minimum(size * 0.5)
    middle = inset + (size - 2 * inset) * uniform(count, room, 2)
    pan = choice(len(PANS), count)
    way = (pan - 1) * (math.pi / 2)
    shift = torch.stack([way.cos(), way.sin()], -1) * between(spec.pan, count, 1) * spec.side / spec.frames
    steps = torch.arange(room).flip(0) + 0.2 + 0.6 * uniform(count, room)
    turn = 2 * math.pi * uniform(count)
    frequency = (0.5 + 0.7 * uniform(count)) / spec.side
    return Layouts(
        spec=spec,
        present=present,
        shape=choice(len(SHAPES), count, room),
        colour=colour,
        texture=choice(len(TEXTURES), count, room),
        direction=direction,
        radius=radius,
        middle=middle,
        velocity=torch.stack([heading.cos(), heading.sin()], -1) * speed[..., None],
        bounces=uniform(count, room) < spec.bounce,
        angle=(uniform(count, room) - 0.5) * (math.pi / 3),
        period=between((0.14, 0.2), count, room) * spec.side,
        cells=uniform(count, room, NOISE_CELLS, NOISE_CELLS),
        distance=0.1 + 0.8 * steps / room,
        background=choice(len(BACKGROUNDS), count),
        pan=pan,
        shift=shift * (pan > 0)[:, None],
        wave=torch.stack([frequency * turn.cos(), frequency * turn.sin(), 2 * math.pi * uniform(count)], -1),
    )
