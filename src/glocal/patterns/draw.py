"""Pictures of patterns as small arrays: who sees whom, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.patterns.base import Pattern, Query

HIDDEN, SEEN, ASKED, GAP = (236, 238, 242), (42, 111, 201), (214, 69, 65), (255, 255, 255)
_LIMIT = 2048  # longest side of a whole mask
_PIXELS = 512


def draw(
    pattern: Pattern,
    canvas: Canvas | Layout,
    query: Query | Sequence[Query] | None = None,
    *,
    head: int | None = None,
    scale: int | None = None,
) -> Tensor:
    """`Pattern.draw`: uint8 [height, width, 3]; keys seen are blue, asked queries red, frames stand side by side.

    Several queries: everything that any of them sees. Raises ValueError if a whole mask is wider than 2048 tokens, or
    a query does not exist.
    """
    layout = Layout.of(canvas)
    pattern.check(layout)
    head = 0 if head is None and pattern.heads is not None else head
    grid = layout.kv.grids[0] if layout.kv.grids else None
    if grid is None or (query is None and len(grid.axes) == 1):
        return _enlarge(_whole(pattern, layout, head), scale)
    if query is None:
        query = tuple(n // 2 for n in grid.axes)
    asked = [_index(layout, grid.axes, grid.name, one) for one in (query if isinstance(query, list) else [query])]  # type: ignore[arg-type]
    q = layout.q.coords(torch.tensor(asked)).unsqueeze(1)
    seen = pattern.allows(q, layout.kv.coords().unsqueeze(0), layout, head).any(0)  # [keys]
    colour = _paint(seen)
    colour[torch.tensor([i for i in asked if i < layout.kv.size], dtype=torch.long)] = torch.tensor(
        ASKED, dtype=torch.uint8
    )
    return _enlarge(_frames(colour[layout.kv.indices(grid.name)], grid.axes), scale)


def _index(layout: Layout, shape: tuple[int, ...], name: str, query: Query) -> int:
    if isinstance(query, int):
        if not 0 <= query < layout.q.size:
            raise ValueError(f"draw: query={query} must lie in 0..{layout.q.size - 1}, the tokens of {layout.q!r}.")
        return query
    place = 0
    for x, n in zip(query, shape, strict=False):
        place = place * n + x
    if len(query) != len(shape) or not all(0 <= x < n for x, n in zip(query, shape, strict=True)):
        raise ValueError(f"draw: query={query} is no place of the grid {shape}.")
    return int(layout.q.indices(name)[place])


def _whole(pattern: Pattern, layout: Layout, head: int | None) -> Tensor:
    if max(layout.nq, layout.nk) > _LIMIT:
        raise ValueError(
            f"draw: a mask of {layout.nq} x {layout.nk} tokens is too large for a picture (longest side {_LIMIT}); "
            f"give query= to see single queries, or draw a shorter canvas."
        )
    q, k = layout.q_coords().unsqueeze(1), layout.kv_coords().unsqueeze(0)
    return _paint(pattern.allows(q, k, layout, head))


def _paint(seen: Tensor) -> Tensor:
    return torch.where(seen[..., None], torch.tensor(SEEN, dtype=torch.uint8), torch.tensor(HIDDEN, dtype=torch.uint8))


def _frames(colour: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Colours [tokens, 3] of a grid as one image [height, width, 3], one token of gap between frames."""
    height, width = (1, *shape)[-2:]
    frames = colour.reshape(prod(shape) // (height * width), height, width, 3)
    gap = torch.tensor(GAP, dtype=torch.uint8).expand(height, 1, 3)
    strips = [strip for frame in frames for strip in (frame, gap)]
    return torch.cat(strips[:-1], dim=1)


def _enlarge(image: Tensor, scale: int | None) -> Tensor:
    if scale is None:
        scale = max(1, _PIXELS // max(image.shape[:2]))
    if scale < 1:
        raise ValueError(f"draw: scale={scale} must be at least 1 pixel a token.")
    return image.repeat_interleave(scale, 0).repeat_interleave(scale, 1).contiguous()
