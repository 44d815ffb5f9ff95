"""Picture of what one query sees: frames of a video stand in rows, so that each is large enough to look at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glocal.patterns import Pattern

PIXELS = 480


def seen_png(pattern: Pattern, shape: tuple[int, ...], query: tuple[int, ...]) -> bytes:
    """PNG of the keys that `query` sees on a grid of axis lengths `shape`; the query itself is red."""
    import torch

    from glocal.canvas import Canvas
    from glocal.report import png_bytes

    image = pattern.draw(Canvas(shape), [query], scale=1)  # [H, frames * (W + 1) - 1, 3]
    height, width = (1, *shape)[-2:]
    frames = math.prod(shape) // (height * width)
    if frames > 1:
        gap = torch.full((height, 1, 3), 255, dtype=torch.uint8)
        columns = math.ceil(math.sqrt(frames * height / width))
        cells = list(torch.cat([image, gap], 1).split(width + 1, 1))
        cells += [torch.full_like(cells[0], 255)] * (-len(cells) % columns)
        rows = [torch.cat(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
        line = torch.full((1, rows[0].shape[1], 3), 255, dtype=torch.uint8)
        image = torch.cat([part for row in rows for part in (row, line)])[:-1, :-1]
    if height == 1:
        image = image.repeat_interleave(max(1, width // 16), 0)  # a sequence: a strip that can be seen
    scale = max(1, PIXELS // max(image.shape[:2]))
    return png_bytes(image.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())
