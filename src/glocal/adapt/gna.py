"""Generalized Neighborhood Attention (arXiv 2504.16922) in diffusion transformers: `gna(pipe)`, `handle.undo()`.

Media tokens see a window of media tokens and all words; words see everything. That is one softmax: the words are a part
of the same plan, which equals the published merge of two attentions by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from glocal.adapt.attach import Handle, attach
from glocal.adapt.presets import Preset, changed_in, chosen
from glocal.adapt.records import SiteCall
from glocal.adapt.sparse import Relation, Schedule, SparseMethod, media_grid, one_an_axis
from glocal.patterns.neighborhood import Neighborhood


@dataclass(frozen=True)
class Window:
    """Window, stride and dilation for each axis of the grid; a window of -1 sees the whole axis."""

    window: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1

    def pattern(self, axes: tuple[int, ...]) -> Neighborhood:
        """The neighbourhood on a grid; ValueError where it does not fit."""
        if len(self.window) != len(axes):
            raise ValueError(
                f"gna: window={self.window} has {len(self.window)} entries, but the media grid {axes} has {len(axes)} "
                "axes; give one an axis."
            )
        whole = tuple(n if w == -1 else w for w, n in zip(self.window, axes, strict=True))
        return Neighborhood(whole, stride=self.stride, dilation=self.dilation)


@dataclass(frozen=True)
class GNASettings:
    """window: of all layers, or of each by number; layers that are not named stay dense. dense_steps, dense_layers:
    first steps of the run and first layers that stay dense.
    """

    window: Window | Mapping[int, Window]
    dense_steps: int = 0
    dense_layers: int = 0


def _cosmos2() -> dict[int, Window]:
    """The layers of Cosmos-Predict2 2B; all see every frame."""
    near, middle, wide = (Window((-1, *w), (1, 4, 8)) for w in ((12, 24), (20, 40), (28, 56)))
    table = {layer: Window((-1, 4, 16), 1, (1, 11, 5)) for layer in (0, 1)}
    table |= {layer: Window((-1, 12, 16), (1, 4, 1), (1, 1, 5)) for layer in (2, 5, 10)}
    table |= dict.fromkeys((3, 4, 6, 7, 8, 9, 27), near)
    table |= dict.fromkeys((*range(11, 23), 24, 25, 26), middle)
    return table | {23: wide}


_COSMOS, _HUNYUAN, _FLUX = (
    ("CosmosTransformer3DModel",),
    ("HunyuanVideoTransformer3DModel",),
    ("FluxTransformer2DModel",),
)
_PAPER = "arXiv 2504.16922"

PRESETS: Mapping[str, Preset[GNASettings]] = {
    "cosmos-predict1-7b-56": Preset(GNASettings(Window((16, 32, 48), (1, 8, 16))), _COSMOS, _PAPER),
    "cosmos-predict1-7b-89": Preset(GNASettings(Window((16, 24, 16), (1, 1, 16)), dense_steps=12), _COSMOS, _PAPER),
    "cosmos-predict2-2b": Preset(GNASettings(_cosmos2()), _COSMOS, "configuration of the authors"),
    "hunyuanvideo-58": Preset(GNASettings(Window((30, 40, 40), (1, 32, 8))), _HUNYUAN, _PAPER),
    "hunyuanvideo-91": Preset(GNASettings(Window((18, 24, 24), (16, 8, 8)), dense_steps=15), _HUNYUAN, _PAPER),
    "flux-4k-90": Preset(GNASettings(Window((80, 80), (16, 16)), dense_steps=9), _FLUX, _PAPER),
}


class GNA(SparseMethod):
    """The method: settings as given."""

    def __init__(self, settings: GNASettings, *, backend: str = "auto") -> None:
        self.settings, self.backend = settings, backend
        self.schedule = Schedule(settings.dense_steps, first_layers=settings.dense_layers)

    def sites(self, sites: tuple[Any, ...]) -> tuple[Any, ...]:
        """Self and joint attention of the layers that have a window."""
        window = self.settings.window
        mine = super().sites(sites)
        return mine if isinstance(window, Window) else tuple(s for s in mine if s.layer in window)

    def relation(self, q: Tensor, k: Tensor, call: SiteCall) -> Relation:
        """The neighbourhood; words follow the layout's policy, which is to see and be seen."""
        window = self.settings.window
        window = window if isinstance(window, Window) else window[call.site.layer]
        return window.pattern(media_grid(call, "gna"))


def gna(
    model: Any,
    preset: str | None = None,
    *,
    settings: GNASettings | None = None,
    window: tuple[int, ...] | None = None,
    stride: tuple[int, ...] | int = 1,
    dilation: tuple[int, ...] | int = 1,
    backend: str = "auto",
    **changed: Any,
) -> Handle:
    """Put Generalized Neighborhood Attention into a pipeline or model.

    preset: of `PRESETS`; None takes the first published for the class. window, stride, dilation: a window of your own
    instead, tokens for each axis of the media grid. settings: all of it. changed: `dense_steps`, `dense_layers`.
    Raises ValueError where a window does not fit the grid, when the first call comes.
    """
    if window is not None:
        found = GNASettings(Window(one_an_axis("gna: window", window), stride, dilation))
    else:
        found = chosen("gna", PRESETS, model, preset) if settings is None else settings
    return attach(model, GNA(changed_in("gna", found, changed), backend=backend))
