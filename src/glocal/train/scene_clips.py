"""Training clips of procedural scenes: a curriculum that shows few frames before it shows all.

Rotary positions take any set of frame times, so a clip of four frames spread over the sixteen teaches motion over the
whole clip at a sixteenth of the attention work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.data import Layouts, SceneSpec, draw_layouts, render
from glocal.data.objects import BACKGROUNDS, COLOURS, DIRECTIONS, PANS, SHAPES, TEXTURES

SCENE_FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("count", ("1", "2", "3", "4", "5")),
    ("shape", SHAPES),
    ("colour", tuple(COLOURS)),
    ("texture", TEXTURES),
    ("direction", DIRECTIONS),
    ("background", tuple(BACKGROUNDS)),
    ("pan", PANS),
)
"""Condition fields of scenes; shape, colour, texture and direction speak of the nearest object."""


@dataclass(frozen=True)
class ClipStage:
    """A stretch of training: `steps` updates on `batch` clips of `frames` frames, noise levels moved by `shift`."""

    frames: int
    batch: int
    steps: int
    shift: float


@dataclass(frozen=True)
class Clips:
    """video [B, T, 3, H, W] in [-1, 1]; condition [B, fields] long; times [T] in frames."""

    video: Tensor
    condition: Tensor
    times: Tensor


def condition_of(layouts: Layouts) -> Tensor:
    """Everything a condition can say about each scene: [B, fields]; the nearest object is the last of a layout."""
    columns = [layouts.present.sum(1) - 1, layouts.shape[:, -1], layouts.colour[:, -1], layouts.texture[:, -1]]
    columns += [layouts.direction[:, -1], layouts.background, layouts.pan]
    return torch.stack(columns, 1) + 1


def draw_times(frames: int, stage_frames: int, generator: torch.Generator) -> Tensor:
    """`stage_frames` of the times 0 .. frames - 1, ascending, any subset alike."""
    if not 1 <= stage_frames <= frames:
        raise ValueError(
            f"frames={stage_frames}: a scene has 1..{frames}; nearest is {min(max(stage_frames, 1), frames)}"
        )
    return torch.randperm(frames, generator=generator)[:stage_frames].sort().values


def draw_clips(stage: ClipStage, spec: SceneSpec, generator: torch.Generator, device: torch.device | str) -> Clips:
    """Draw and paint the clips of one update."""
    layouts = draw_layouts(stage.batch, generator, spec)
    times = draw_times(spec.frames, stage.frames, generator).to(device)
    video = render(layouts.to(device), times).video * 2 - 1
    return Clips(video, condition_of(layouts).to(device), times)
