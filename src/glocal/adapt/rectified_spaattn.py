"""Rectified SpaAttn (arXiv 2511.19835) in diffusion transformers: `rectified_spaattn(pipe)`, `handle.undo()`.

Media tokens run along a Gilbert curve through all blocks (permuted once a forward where the host can, else by the
gather list of every plan). Each block of queries keeps the key blocks whose reallocated shares are largest; the words
compete for places as one column and are always seen. The output is scaled by the mass of what was kept, and dropped
blocks that their means stand for come back as mean values (`glocal.ops.rectify`). Words see everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from glocal._kept import ordinary
from glocal.adapt.attach import Handle, attach
from glocal.adapt.presets import Preset, changed_in, chosen
from glocal.adapt.records import SiteCall
from glocal.adapt.sparse import Relation, Schedule, SparseMethod, media_grid
from glocal.canvas import Canvas, Layout, Order
from glocal.canvas.curves import gilbert
from glocal.canvas.touching import touching_blocks
from glocal.ops.epilogue import Epilogue, GroupEpilogue
from glocal.ops.rectify import rectification, spread
from glocal.plan.blockplan import BlockPlan
from glocal.plan.dynamic import plan_blocks
from glocal.routing.keep import Keep
from glocal.routing.partition import Partition
from glocal.routing.shares import Shares, Tail, helpful, means, pooled, shares


@dataclass(frozen=True)
class SpaSettings:
    """drop: share of media blocks that a query block may drop at most. mass: as many of the best blocks as hold this
    share of the mass are kept too. block: tokens of a block. neighbours: blocks that touch in space are always kept.
    first_frame: blocks of the first frame see each other. rectify: scale and fill up the output.

    curve: "gilbert", or "raster" for the tokens as they lie. tail: how the last block is averaged where tokens are
    missing (`glocal.routing.shares.pooled`; published: "block"). dense_steps, dense_layers: first ones that stay dense;
    layers: more of them by number; expert_steps: first steps of single experts.
    """

    drop: float = 0.8
    mass: float = 0.3
    block: int = 128
    neighbours: bool = True
    first_frame: bool = False
    rectify: bool = True
    curve: Literal["gilbert", "raster"] = "gilbert"
    tail: Tail = "count"
    dense_steps: int = 0
    dense_layers: int = 0
    layers: frozenset[int] = frozenset()
    expert_steps: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ValueError(f"SpaSettings: drop={self.drop} must lie between 0 (dense) and 1.")
        if self.curve not in ("gilbert", "raster"):
            raise ValueError(f"SpaSettings: curve={self.curve!r}; legal: 'gilbert', 'raster'.")


_WAN = ("WanTransformer3DModel",)
_CODE = "configurations of the authors' repository"

PRESETS: Mapping[str, Preset[SpaSettings]] = {
    "hunyuanvideo": Preset(SpaSettings(0.8), ("HunyuanVideoTransformer3DModel",), _CODE),
    "wan2.1-t2v": Preset(SpaSettings(0.75, first_frame=True, dense_steps=5, dense_layers=2), _WAN, _CODE, experts=1),
    "wan2.1-i2v": Preset(SpaSettings(0.75, first_frame=True, dense_layers=2), _WAN, _CODE, experts=1),
    # Published as calls, of which guidance makes two a step: six of the first expert, two of the second.
    "wan2.2-t2v": Preset(
        SpaSettings(0.85, first_frame=True, dense_layers=2, expert_steps={"transformer": 3, "transformer_2": 1}),
        _WAN,
        _CODE,
        experts=2,
    ),
    "wan2.2-i2v": Preset(SpaSettings(0.85, first_frame=True, dense_layers=2), _WAN, _CODE, experts=2),
    "cogvideox1.5-t2v": Preset(SpaSettings(0.85, dense_steps=5), ("CogVideoXTransformer3DModel",), _CODE),
    "cogvideox1.5-i2v": Preset(SpaSettings(0.75, dense_steps=5), ("CogVideoXTransformer3DModel",), _CODE),
    "flux-4k": Preset(SpaSettings(0.9, layers=frozenset(range(37, 57))), ("FluxTransformer2DModel",), _CODE),
}


@dataclass(frozen=True, eq=False)
class Routed:
    """What is decided for one call. plan: who sees whom. share, kept, good: of the media blocks, [B, H, query
    groups, key groups]. part: the media groups; whole: those of all tokens, the words behind.
    """

    plan: BlockPlan
    share: Shares
    kept: Tensor
    good: Tensor
    part: Partition
    whole: Partition


class RectifiedSpaAttn(SparseMethod):
    """The method: settings as given."""

    def __init__(self, settings: SpaSettings, *, backend: str = "auto") -> None:
        self.settings, self.backend = settings, backend
        self.schedule = Schedule(
            settings.dense_steps,
            first_layers=settings.dense_layers,
            layers=settings.layers,
            components=settings.expert_steps,
        )
        self._routed: Routed | None = None  # between `relation` and `epilogue` of one call

    def order(self, axes: tuple[int, ...]) -> Order | None:
        """The curve, for hosts that can take tokens along it."""
        return None if self.settings.curve == "raster" else _curve(axes)

    def relation(self, q: Tensor, k: Tensor, call: SiteCall) -> Relation:
        """Route this call."""
        axes = media_grid(call, "rectified_spaattn")
        self._routed = route_call(q, k, call, axes, self.settings)
        return self._routed.plan

    def epilogue(
        self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, relation: Relation
    ) -> Epilogue | GroupEpilogue | None:
        """Factor and addend of the media rows."""
        routed, self._routed = self._routed, None
        if not self.settings.rectify or routed is None:
            return None
        mean = means(v, routed.part, self.settings.tail)
        factor, addend = rectification(routed.share, routed.kept, routed.good, mean)
        return spread(routed.whole, q.shape[2], factor, addend, v.dtype)


def route_call(q: Tensor, k: Tensor, call: SiteCall, axes: tuple[int, ...], settings: SpaSettings) -> Routed:
    """Choose key blocks for one call of a site; q, k [B, H, N, D]."""
    canvas, block = call.layout.q, settings.block
    if canvas.arrives not in ("raster", settings.curve):
        raise ValueError(
            f"rectified_spaattn: tokens lie in order {canvas.arrives!r}; legal: 'raster', {settings.curve!r}. Undo the "
            "method that put them there."
        )
    curve = settings.curve if canvas.arrives == "raster" else "raster"
    part, whole, words = partitions(canvas, curve, axes, block, str(q.device))
    mine, theirs = pooled(q, part, settings.tail), pooled(k, part, settings.tail)
    share = shares(mine, theirs, word_keys(k, words, call.layout), call.site.scale)
    forced = _forced(axes, block, settings.curve, settings.neighbours, settings.first_frame).to(q.device)
    least = least_kept(settings.drop, part.groups)
    keep = Keep(mass=settings.mass, crossing="in", at_least=least, forced="union")
    kept = kept_blocks(keep, share, forced)
    mask = torch.nn.functional.pad(kept, (0, whole.groups - part.groups, 0, whole.groups - part.groups), value=True)
    good = helpful(mine, theirs) if settings.rectify else kept
    return Routed(plan_blocks(mask, call.layout, whole, whole), share, kept, good, part, whole)


def least_kept(drop: float, groups: int) -> int:
    """How many columns a query block keeps at least; the words are one of them, so that at 0 there is one more."""
    return int((1 - drop) * groups) if drop else groups + 1


def kept_blocks(keep: Keep, share: Shares, forced: Tensor | None = None) -> Tensor:
    """Bool [B, H, query groups, key groups]: the blocks that won a place, and the forced ones. Words compete for places
    as one column.
    """
    blocks, words = share.logits.tensor_split([share.blocks.shape[-1]], -1)
    return keep.mask(blocks, forced=forced, competing=words if words.shape[-1] else None)


def word_keys(k: Tensor, words: Tensor, layout: Layout) -> Tensor | None:
    """Keys of the words, hidden ones marked by NaN in their first channel."""
    if not words.numel():
        return None
    found = k[:, :, words].float()
    segments = layout.segments(k.shape[0], k.device)
    if segments is not None:
        hidden = segments[1][:, words] < 0  # [B, words]
        found[..., 0] = found[..., 0].masked_fill(hidden[:, None], torch.nan)
    return found


@lru_cache(maxsize=16)
@ordinary()
def _curve(axes: tuple[int, ...]) -> Order:
    return Order("gilbert", gilbert(axes))


@lru_cache(maxsize=16)
@ordinary()
def partitions(
    canvas: Canvas, curve: str, axes: tuple[int, ...], block: int, device: str
) -> tuple[Partition, Partition, Tensor]:
    """Groups of the media tokens along the curve, groups of all tokens (the words behind), and the words."""
    media = next(p.name for p in canvas.parts if p.is_grid or p.name in ("video", "image"))
    tokens = canvas.indices(media)
    tokens = tokens[gilbert(axes)] if curve == "gilbert" else tokens
    words = torch.cat(
        [torch.zeros(0, dtype=torch.long), *(canvas.indices(p.name) for p in canvas.parts if p.name != media)]
    )
    pieces = [torch.nn.functional.pad(t, (0, -t.numel() % block), value=-1) for t in (tokens, words)]
    members = [p.reshape(1, 1, -1, block).int().to(device) for p in (pieces[0], torch.cat(pieces))]
    media_blocks = Partition(members[0], f"{curve} blocks", fixed=True)
    return media_blocks, Partition(members[1], f"{curve} blocks, words", fixed=True), words.to(device)


@lru_cache(maxsize=16)
@ordinary()
def _forced(axes: tuple[int, ...], block: int, curve: str, neighbours: bool, first_frame: bool) -> Tensor:
    """Blocks that are kept whatever their score, bool [groups, groups]."""
    order = gilbert(axes) if curve == "gilbert" else torch.arange(prod(axes))
    groups = -(-order.numel() // block)
    forced = touching_blocks(order, axes, block) if neighbours else torch.zeros(groups, groups, dtype=torch.bool)
    if first_frame:
        first = groups // axes[0]
        forced[:first, :first] = True
    return forced


def rectified_spaattn(
    model: Any,
    preset: str | None = None,
    *,
    settings: SpaSettings | None = None,
    backend: str = "auto",
    **changed: Any,
) -> Handle:
    """Put Rectified SpaAttn into a pipeline or model.

    preset: of `PRESETS`; None takes the first published for the class. settings: instead of a preset. changed: single
    fields of the settings, such as ``drop=0.9``.
    Raises ValueError for a preset of another class, an unknown field, a canvas without one media grid.
    """
    found = chosen("rectified_spaattn", PRESETS, model, preset) if settings is None else settings
    return attach(model, RectifiedSpaAttn(changed_in("rectified_spaattn", found, changed), backend=backend))
