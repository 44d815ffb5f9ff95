"""Paints scene layouts: a signed-distance rasteriser in plain torch, batched over scenes, times and pixels.

Objects are painted from far to near with anti-aliased edges; a pixel belongs to the nearest object that covers at
least half of it. The camera pan moves near things more than far ones, the background least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.data.objects import BACKGROUNDS, COLOURS, Layouts


@dataclass(frozen=True)
class Rendered:
    """Pictures of B scenes at T times.

    video [B, T, 3, H, W] in [0, 1]; owner [B, T, H, W] index of the visible object, -1 for the background;
    depth [B, T, H, W] in (0, 1], 1 is the background; centres [B, T, K, 2] as (x, y) in px.
    """

    video: Tensor
    owner: Tensor
    depth: Tensor
    centres: Tensor


def centres_at(layouts: Layouts, times: Tensor) -> Tensor:
    """Where object centres are: times [T] in frames -> [B, T, K, 2] as (x, y) px in the picture."""
    spec = layouts.spec
    elapsed = (times - (spec.frames - 1) / 2).view(1, -1, 1, 1)
    free = layouts.middle[:, None] + layouts.velocity[:, None] * elapsed  # [B, T, K, 2]
    size = torch.tensor([float(spec.width), float(spec.height)], device=free.device)
    inset = (layouts.radius[..., None] * 0.8).minimum(size * 0.5)[:, None]
    span = (size - 2 * inset).clamp(min=1e-3)
    folded = inset + span - ((free - inset).remainder(2 * span) - span).abs()
    world = torch.where(layouts.bounces[:, None, :, None], folded, free)
    nearness = (1 - layouts.distance)[:, None, :, None]
    return world - layouts.shift[:, None, None] * elapsed * (0.5 + 0.5 * nearness)


def _distance(shape: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in px (negative inside) of the shape numbered by the order of SHAPES."""
    across, along, length = u.abs(), v.abs(), torch.hypot(u, v)
    disc = length - radius
    square = torch.maximum(across, along) - 0.85 * radius
    triangle = torch.maximum(across * (math.sqrt(3) / 2) - v * 0.5, v) - 0.55 * radius
    diamond = (across + along - 1.15 * radius) * math.sqrt(0.5)
    ring = (length - 0.72 * radius).abs() - 0.28 * radius
    arm = 0.34 * radius
    upright = torch.maximum(across - arm, along - radius)
    lying = torch.maximum(across - radius, along - arm)
    cross = torch.minimum(upright, lying)
    out = disc
    for number, other in enumerate((square, triangle, diamond, ring, cross), start=1):
        out = torch.where(shape == number, other, out)
    return out


def _paint(layouts: Layouts, index: int, u: Tensor, v: Tensor) -> Tensor:
    """Share of the light colour (1) against the dark one (0) of object `index` at local places u, v [B, T, H, W]."""
    batch, times, height, width = u.shape
    texture = layouts.texture[:, index].view(-1, 1, 1, 1)
    angular = (2 * math.pi / layouts.period[:, index]).view(-1, 1, 1, 1)
    # Steep sines instead of square waves: the edges are about a pixel wide, as the outlines are.
    first, second = (u * angular).sin(), (v * angular).sin()
    striped = (0.5 + 2.0 * first).clamp(0, 1)
    checkered = (0.5 + 3.0 * first * second).clamp(0, 1)
    reach = (1.2 * layouts.radius[:, index]).view(-1, 1, 1, 1)
    places = torch.stack([u / reach, v / reach], -1).view(batch, times * height, width, 2)
    cells = layouts.cells[:, index, None]  # [B, 1, C, C]
    noise = F.grid_sample(cells, places, align_corners=True, padding_mode="border").view(batch, times, height, width)
    noisy = (0.5 + 2.5 * (noise - 0.5)).clamp(0, 1)
    light = torch.where(texture == 1, striped, torch.ones_like(u))
    return torch.where(texture == 2, checkered, torch.where(texture == 3, noisy, light))


def render(layouts: Layouts, times: Tensor | None = None) -> Rendered:
    """Paint every layout at `times` [T] (frames, may be fractional; default all frames of the spec)."""
    spec, device = layouts.spec, layouts.present.device
    if times is None:
        times = torch.arange(spec.frames, device=device)
    times = times.to(device=device, dtype=torch.float32)
    x = torch.arange(spec.width, device=device) + 0.5
    y = (torch.arange(spec.height, device=device) + 0.5)[:, None]
    centres = centres_at(layouts, times)  # [B, T, K, 2]
    batch, count = len(layouts), times.numel()

    elapsed = (times - (spec.frames - 1) / 2).view(1, -1, 1, 1)
    shift = 0.5 * layouts.shift.view(-1, 2, 1, 1, 1) * elapsed[:, None]  # [B, 2, T, 1, 1]
    wave = layouts.wave.view(-1, 3, 1, 1, 1)
    blend = (
        0.5 + 0.5 * (2 * math.pi * (wave[:, 0] * (x + shift[:, 0]) + wave[:, 1] * (y + shift[:, 1])) + wave[:, 2]).sin()
    )
    ends = torch.tensor(list(BACKGROUNDS.values()), device=device)[layouts.background]  # [B, 2, 3]
    start, end = ends[:, 0].view(-1, 1, 3, 1, 1), ends[:, 1].view(-1, 1, 3, 1, 1)
    video = torch.lerp(start, end, blend[:, :, None])  # [B, T, 3, H, W]

    owner = torch.full((batch, count, spec.height, spec.width), -1, dtype=torch.long, device=device)
    depth = torch.ones(batch, count, spec.height, spec.width, device=device)
    palette = torch.tensor(list(COLOURS.values()), device=device)
    for index in range(layouts.present.shape[1]):
        away = centres[:, :, index, :, None, None]  # [B, T, 2, 1, 1]
        dx, dy = x - away[:, :, 0], y - away[:, :, 1]  # [B, T, 1, W], [B, T, H, 1]
        angle = layouts.angle[:, index].view(-1, 1, 1, 1)
        u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
        shape = layouts.shape[:, index].view(-1, 1, 1, 1)
        cover = (0.5 - _distance(shape, u, v, layouts.radius[:, index].view(-1, 1, 1, 1))).clamp(0, 1)
        cover = cover * layouts.present[:, index].view(-1, 1, 1, 1)
        light = palette[layouts.colour[:, index]].view(-1, 1, 3, 1, 1)
        paint = light * (0.4 + 0.6 * _paint(layouts, index, u, v))[:, :, None]
        video = torch.lerp(video, paint, cover[:, :, None])
        seen = cover >= 0.5
        owner = torch.where(seen, index, owner)
        depth = torch.where(seen, layouts.distance[:, index].view(-1, 1, 1, 1), depth)
    return Rendered(video, owner, depth, centres)
