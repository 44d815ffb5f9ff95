"""Radial Attention (arXiv 2506.19852) in video diffusion models: `radial(pipe)`, `handle.undo()`.

Self and joint attention run over the published block mask (`glocal.patterns.RadialBlocks`), except in the first steps
and layers; text of a joint sequence sees and is seen by everything, as many words as each sample has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from glocal.adapt.attach import Handle, attach
from glocal.adapt.lora import with_lora
from glocal.adapt.presets import Preset, changed_in, chosen
from glocal.adapt.records import SiteCall
from glocal.adapt.rectified_spaattn import partitions, word_keys
from glocal.adapt.sparse import Relation, Schedule, SparseMethod, media_grid
from glocal.ops.epilogue import Epilogue, GroupEpilogue
from glocal.ops.rectify import rectification, spread
from glocal.patterns.radial import RadialBlocks, pooled_band
from glocal.routing.shares import helpful, means, pooled, shares


@dataclass(frozen=True)
class RadialSettings:
    """decay, block, sink: of the mask (`RadialBlocks`; sink: everybody sees the first frame).

    dense_steps, dense_layers: first steps of the run and first layers that stay dense; dense_last_steps: last steps.
    rectify: scale and fill up the output for the blocks the mask drops, as Rectified SpaAttn does (arXiv 2511.19835).
    """

    decay: float = 1.0
    block: int = 128
    sink: bool = True
    dense_steps: int = 0
    dense_layers: int = 0
    dense_last_steps: int = 0
    rectify: bool = False

    @property
    def pattern(self) -> RadialBlocks:
        """The mask."""
        model: Literal["wan", "hunyuan"] = "wan" if self.sink else "hunyuan"
        return RadialBlocks(block=self.block, decay=self.decay, model=model)


_WAN, _HUNYUAN, _MOCHI = ("WanTransformer3DModel",), ("HunyuanVideoTransformer3DModel",), ("MochiTransformer3DModel",)
_SCRIPTS = "scripts of the authors' repository"

PRESETS: Mapping[str, Preset[RadialSettings]] = {
    "wan2.1-14b": Preset(RadialSettings(0.2, dense_steps=12, dense_layers=1), _WAN, _SCRIPTS, experts=1),
    # The decay of longer videos is not published; 1.0 gives the sparsity that is.
    "wan2.1-14b-long": Preset(RadialSettings(1.0, dense_steps=2, dense_layers=2), _WAN, "arXiv 2506.19852", experts=1),
    "wan2.1-8-steps": Preset(RadialSettings(0.2, dense_steps=2, dense_layers=1), _WAN, _SCRIPTS, experts=1),
    "wan2.1-4-steps": Preset(RadialSettings(0.2, dense_steps=1, dense_layers=1), _WAN, _SCRIPTS, experts=1),
    "wan2.2-a14b": Preset(RadialSettings(0.8, 64, dense_steps=11, dense_layers=1), _WAN, _SCRIPTS, experts=2),
    "hunyuanvideo": Preset(RadialSettings(0.95, sink=False, dense_steps=12), _HUNYUAN, _SCRIPTS),
    "hunyuanvideo-long": Preset(
        RadialSettings(1.0, sink=False, dense_steps=2, dense_layers=2), _HUNYUAN, "arXiv 2506.19852"
    ),
    "mochi": Preset(
        RadialSettings(0.95, sink=False, dense_steps=12), _MOCHI, "arXiv 2506.19852; decay of HunyuanVideo"
    ),
}


class Radial(SparseMethod):
    """The method: settings as given."""

    def __init__(self, settings: RadialSettings, *, backend: str = "auto") -> None:
        self.settings, self.backend = settings, backend
        self.schedule = Schedule(settings.dense_steps, settings.dense_last_steps, settings.dense_layers)

    def relation(self, q: Tensor, k: Tensor, call: SiteCall) -> Relation:
        """The mask of the canvas; it is planned once for each size."""
        axes = media_grid(call, "radial")
        first = call.layout.q.parts[0]
        if len(axes) < 2 or not first.is_grid or first.name == "image":
            raise ValueError(
                f"radial: site {call.site.name!r} attends on {call.layout.q!r}; legal: frames of tokens first, text "
                "behind them, in raster order; an image has no frames."
            )
        return self.settings.pattern

    def epilogue(
        self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, relation: Relation
    ) -> Epilogue | GroupEpilogue | None:
        """Factor and addend of the media rows, if asked for."""
        if not self.settings.rectify:
            return None
        canvas, pattern = call.layout.q, self.settings.pattern
        part, whole, words = partitions(canvas, "raster", canvas.grid.axes, pattern.block, str(q.device))
        mask = pattern.block_mask(call.layout)[0, : part.groups, : part.groups].to(q.device)
        mine, theirs = pooled(q, part), pooled(k, part)
        share = shares(mine, theirs, word_keys(k, words, call.layout), call.site.scale)
        kept = mask.expand(share.blocks.shape)
        factor, addend = rectification(share, kept, helpful(mine, theirs), means(v, part))
        return spread(whole, q.shape[2], factor, addend, v.dtype)


def radial(
    model: Any,
    preset: str | None = None,
    *,
    settings: RadialSettings | None = None,
    lora: str | Path | Mapping[str, Tensor] | None = None,
    backend: str = "auto",
    **changed: Any,
) -> Handle:
    """Put Radial Attention into a pipeline or model.

    preset: of `PRESETS`; None takes the first published for the class. settings: instead of a preset. changed: single
    fields of the settings, such as ``dense_last_steps=2``. lora: weights tuned for longer videos, a file or its
    tensors, loaded into a pipeline for as long as the method is in it.
    Raises ValueError for a preset of another class, an unknown field, a host without a grid of frames.
    """
    found = chosen("radial", PRESETS, model, preset) if settings is None else settings
    method = Radial(changed_in("radial", found, changed), backend=backend)
    return attach(model, method) if lora is None else with_lora(model, method, lora)


def density(settings: RadialSettings, frames: int, tokens: int) -> float:
    """Share of blocks kept for `frames` of `tokens` tokens without text, from one count for each frame distance.

    Exact where frames are whole blocks; never holds a mask of the video.
    """
    if tokens % settings.block:
        raise ValueError(f"density: tokens={tokens} must be a multiple of block={settings.block}.")
    pattern, side = settings.pattern, tokens // settings.block
    total = 0
    for gap in range(frames):
        pairs = (frames - gap) * (2 if gap else 1)
        sinks = 1 if settings.sink and gap else 0  # the pair (gap, 0) is kept whole
        total += sinks * side * side
        if pattern.keeps(gap, tokens):
            reach = min(int(pattern.width(gap, tokens)), tokens)
            total += (pairs - sinks) * int(pooled_band(tokens, reach, settings.block, 0, 0).sum())
    return total / (frames * side) ** 2
