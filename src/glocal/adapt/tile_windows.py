"""Sliding tile attention (arXiv 2502.04507) in diffusion transformers: `tile_windows(pipe, tile=..., window=...)`.

The media grid is cut into tiles; every tile sees the window of whole tiles around its own, and all words. Nothing
inside a pair of tiles is masked, so kernels waste no work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from glocal.adapt.attach import Handle, attach
from glocal.adapt.records import SiteCall
from glocal.adapt.sparse import Relation, Schedule, SparseMethod, media_grid, one_an_axis
from glocal.patterns.tilewindow import TileWindows


@dataclass(frozen=True)
class TileSettings:
    """tile: tokens of a tile on each axis; window: tiles seen on each axis. dense_steps, dense_layers: first steps and
    layers that stay dense.
    """

    tile: tuple[int, ...]
    window: tuple[int, ...]
    dense_steps: int = 0
    dense_layers: int = 0


class TileMethod(SparseMethod):
    """The method: settings as given."""

    def __init__(self, settings: TileSettings, *, backend: str = "auto") -> None:
        self.settings, self.backend = settings, backend
        self.schedule = Schedule(settings.dense_steps, first_layers=settings.dense_layers)

    def relation(self, q: Tensor, k: Tensor, call: SiteCall) -> Relation:
        """The windows; they are planned once for each size."""
        axes = media_grid(call, "tile_windows")
        for name in ("tile", "window"):
            value = getattr(self.settings, name)
            if len(value) != len(axes):
                raise ValueError(
                    f"tile_windows: {name}={value} has {len(value)} entries, but the media grid {axes} has {len(axes)} "
                    "axes; give one an axis."
                )
        return TileWindows(self.settings.tile, self.settings.window)


def tile_windows(
    model: Any,
    *,
    tile: tuple[int, ...],
    window: tuple[int, ...],
    dense_steps: int = 0,
    dense_layers: int = 0,
    backend: str = "auto",
) -> Handle:
    """Put tile windows into a pipeline or model.

    tile: tokens of a tile on each axis, best a whole number of kernel blocks, such as (6, 8, 8); window: tiles on each
    axis. Raises ValueError where a window does not fit the grid, when the first call comes.
    """
    sizes = one_an_axis("tile_windows: tile", tile), one_an_axis("tile_windows: window", window)
    settings = TileSettings(*sizes, dense_steps, dense_layers)
    return attach(model, TileMethod(settings, backend=backend))
