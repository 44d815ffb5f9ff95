"""C-Upscale (arXiv 2505.16976) in a model with cross attention: each region of a large picture sees the words of the
whole one where they belong. `handle = c_upscale(pipe)`; `glocal.adapt.c_upscale_run.upscale` is all of it in one call.

At every step the small picture goes through the model once and what it reads of the words is kept (`whole`). A region
then reads the global prompt by the crop of these cross-attention maps, so that words whose object is elsewhere do not
fire, and a prompt of its own by its own attention; both are mixed (`regions`). Crop and sum over words are linear and
the words' values are the same everywhere, so a crop of maps times values is the crop of their product: the outputs of
the small picture's cross attention are kept, and maps only where words are damped. Only the abstract is public: a
reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal._kept import ordinary
from glocal.adapt.attach import Handle, Method, attach
from glocal.adapt.maps import Box
from glocal.adapt.records import Core, Site, SiteCall
from glocal.ops import Score, merge
from glocal.ops.capture import Capture
from glocal.ops.frequency import Filter

Rap = Literal["replace", "gate", "off"]


@dataclass(frozen=True)
class CUpscaleSettings:
    """strength: the last share of the `steps` that is run on the enlarged picture. guidance: classifier-free.

    window: rows and columns of a region in latents, None: the trained size. overlap: share of a region that the next
    one repeats. jitter: regions move at random from step to step. region_batch: regions in one call of the model.
    structure: weight of the low frequencies of the small picture in the first step, 0: none; it falls with a cosine and
    acts in the first `structure_share` of the steps. cutoff: of these frequencies, as a share of the highest that the
    small picture holds. filter: "gaussian" or "ideal".
    rap: the global prompt is read by crops of the maps ("replace"), by the region's own attention with words that lie
    elsewhere damped ("gate"), or undamped ("off"). mix: share of the regional prompt at the first and at the last step.
    capture_every: steps for which what the small picture reads is kept.
    """

    steps: int = 50
    strength: float = 0.7
    guidance: float = 7.5
    window: tuple[int, int] | None = None
    overlap: float = 0.5
    jitter: bool = True
    region_batch: int = 4
    structure: float = 1.0
    structure_share: float = 0.5
    cutoff: float = 0.5
    filter: Filter = "gaussian"
    rap: Rap = "replace"
    mix: tuple[float, float] = (0.3, 0.7)
    capture_every: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "region_batch", "capture_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"c_upscale: {name}={getattr(self, name)!r} must be at least 1.")
        for name, low, high in (("strength", 0, 1), ("structure_share", 0, 1), ("overlap", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high or (name == "strength" and value == 0) or (name == "overlap" and value == 1):
                raise ValueError(f"c_upscale: {name}={value!r} must lie between 0 and 1.")
        if len(self.mix) != 2 or not all(0 <= share <= 1 for share in self.mix):
            raise ValueError(f"c_upscale: mix={self.mix!r}; legal: two shares between 0 and 1.")
        if self.rap not in ("replace", "gate", "off"):
            raise ValueError(f"c_upscale: rap={self.rap!r}; legal: 'replace', 'gate', 'off'.")
        if self.cutoff <= 0:
            raise ValueError(f"c_upscale: cutoff={self.cutoff!r} must be above 0; the default is 0.5.")

    @property
    def run_steps(self) -> int:
        """How many steps are run, S."""
        return min(max(int(self.steps * self.strength), 1), self.steps)

    def structure_weight(self, step: int) -> float:
        """w of a step, which counts from 0."""
        if step >= self.structure_share * self.run_steps:
            return 0.0
        return self.structure * (math.cos(math.pi * step / self.run_steps) + 1) / 2

    def regional_share(self, step: int) -> float:
        """b of a step: how much of the attention reads the regional prompt."""
        first, last = self.mix
        return first + (last - first) * (step / (self.run_steps - 1) if self.run_steps > 1 else 0)


@dataclass(frozen=True, eq=False)
class Row:
    """One region in the batch: of which picture, where, and which words are damped (bool [words], None: all)."""

    picture: int
    box: Box
    words: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Regions:
    rows: Sequence[Row]
    words: int
    share: float
    rap: Rap

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """Of the rows."""
        return tuple(row.box for row in self.rows)

    @cached_property
    def pictures(self) -> Tensor:
        """Of the rows."""
        return torch.tensor([row.picture for row in self.rows])

    @cached_property
    def damped(self) -> Tensor | None:
        """Which words of each row may be damped, bool [rows, words]; None: all."""
        if all(row.words is None for row in self.rows):
            return None
        every = torch.ones(self.words, dtype=torch.bool)
        return torch.stack([every if row.words is None else row.words.cpu() for row in self.rows])


class CUpscale(Method):
    """The method. Outside of `whole` and `regions` the model is untouched.

    seen: what the small pictures read by site, [pictures, heads, rows, columns, n]: outputs, n the channels of a head,
    or where words are damped maps, n the words.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self._kept: Rap = "off"
        self._now: Rap | _Regions | None = None

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Cross attention; ValueError for a model without."""
        found = tuple(s for s in sites if s.kind == "cross")
        if not found:
            kinds = ", ".join(sorted({s.kind for s in sites}))
            raise ValueError(
                f"c_upscale: the model has attention of kind {kinds}; legal: cross attention to words (Stable "
                "Diffusion 1.5, XL, PixArt, the built-in image models)."
            )
        return found

    @contextmanager
    def whole(self, rap: Rap = "replace") -> Iterator[None]:
        """Forwards in here keep what `rap` needs of their rows, one a picture; what they compute does not change."""
        self.seen.clear()
        self._kept = rap
        with self._as(rap):
            yield

    @contextmanager
    def regions(self, rows: Sequence[Row], words: int, share: float, rap: Rap) -> Iterator[None]:
        """Forwards in here are regions: rows without guidance, then those with it, in the same order.

        Their text is the global prompt, `words` long, and behind it the regional one; only the global one may be given
        where both are the same. share: of the regional prompt. ValueError where `whole` kept nothing for this `rap`.
        """
        if rap not in ("off", self._kept):
            raise ValueError(
                f"c_upscale: regions(rap={rap!r}) behind whole({self._kept!r}); legal: whole({rap!r}) before, or 'off'."
            )
        with self._as(_Regions(rows, words, share, rap)):
            yield

    @contextmanager
    def _as(self, now: Rap | _Regions) -> Iterator[None]:
        before, self._now = self._now, now
        try:
            yield
        finally:
            self._now = before

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """q [B, H, N, D], k and v [B, H, words, D] -> [B, H, N, D]."""
        now = self._now
        if now is None or getattr(call.native, "number", 0) > 0:
            return inner(q, k, v, call)  # a second call of a site is that to an image prompt
        if isinstance(now, _Regions):
            return self._composed(q, k, v, call, now)
        out = seen = inner(q, k, v, call)  # [B, H, N, D]
        if now == "gate":
            seen = Capture(q, k, canvas=call.layout, score=Score(scale=call.site.scale)).rows()  # [B, H, N, words]
        if now != "off":
            self.seen[call.site.name] = seen.unflatten(2, _grid(call))
        return out

    def _composed(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, now: _Regions) -> Tensor:
        """Rows without guidance as they are; of the others, global and regional words mixed."""
        half, words = len(now.rows), now.words
        if q.shape[0] != 2 * half or k.shape[2] not in (words, 2 * words):
            raise ValueError(
                f"c_upscale: site {call.site.name!r} has {q.shape[0]} rows and {k.shape[2]} words; legal: {2 * half} "
                f"rows (without and with guidance) and {words} or {2 * words} words."
            )
        mask = getattr(call.native, "mask", None)
        if mask is not None:
            mask = mask.expand(q.shape[0], *mask.shape[1:])
        first, last = slice(0, words), slice(k.shape[2] - words, None)

        def read(rows: slice, part: slice, bias: Tensor | None = None) -> Tensor:
            hidden = None if mask is None else mask[rows][..., part]
            if hidden is not None and hidden.dtype == torch.bool:
                hidden = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(~hidden, -torch.inf)
            both = bias if hidden is None else hidden if bias is None else hidden + bias
            return F.scaled_dot_product_attention(
                q[rows], k[rows][:, :, part], v[rows][:, :, part], both, scale=call.site.scale
            )

        free, guided = slice(0, half), slice(half, None)
        if now.rap == "off":
            by_words = read(guided, first)
        else:
            whole = self.seen[call.site.name]
            whole = whole.expand(half, *whole.shape[1:]) if len(whole) == 1 else whole[now.pictures.to(whole.device)]
            here = crop(whole, now.boxes, _grid(call))
            if now.rap == "replace":
                by_words = here.to(v.dtype)
            else:
                by_words = read(guided, first, damping(whole, here, now.damped).log().to(q.dtype)[:, :, None])
        if now.share > 0:
            by_words = merge.gate(now.share, read(guided, last), by_words)
        return torch.cat([read(free, first), by_words])


def _grid(call: SiteCall) -> tuple[int, int]:
    """Rows and columns of the queries; ValueError for a video."""
    *frames, rows, columns = call.layout.q.grid.axes
    if any(n > 1 for n in frames):
        raise ValueError(f"c_upscale: site {call.site.name!r} attends from {call.layout.q!r}; legal: one picture.")
    return rows, columns


def crop(seen: Tensor, boxes: Box | Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """seen [regions, heads, h, w, n] of whole pictures, a box each -> [regions, heads, rows * columns, n] of the
    regions, float32; without the first axis for a single box.

    Cells of a region's `grid` are read bilinearly at their centres, wherever the box lies: rows of maps keep their sum.
    """
    if isinstance(boxes, Box):
        return crop(seen[None], (boxes,), grid)[0]
    down, across = _weights(tuple(boxes), tuple(seen.shape[2:4]), grid, str(seen.device))
    found = down[:, None] @ seen.float().flatten(3)  # [regions, heads, rows, w * n]
    found = across[:, None, None] @ found.unflatten(3, seen.shape[3:])  # [regions, heads, rows, columns, n]
    return found.flatten(2, 3)


@lru_cache(maxsize=64)
@ordinary()
def _weights(
    boxes: tuple[Box, ...], size: tuple[int, int], grid: tuple[int, int], device: str
) -> tuple[Tensor, Tensor]:
    """What each row [boxes, rows, h] and each column [boxes, columns, w] of boxes is made of; every layer asks."""
    sides = torch.tensor([(b.top, b.bottom, b.left, b.right) for b in boxes]).unflatten(1, (2, 2))  # [boxes, axis, end]

    def axis(number: int) -> Tensor:
        (first, last), length, cells = sides[:, number].unbind(1), size[number], grid[number]
        centres = first[:, None] + (torch.arange(cells) + 0.5) / cells * (last - first)[:, None]  # [boxes, cells]
        places = (centres * length - 0.5).clamp(0, length - 1)
        return (1 - (places[..., None] - torch.arange(length)).abs()).clamp(min=0).to(device)

    return axis(0), axis(1)


def damping(maps: Tensor, region: Tensor, words: Tensor | None = None) -> Tensor:
    """Factors [..., heads, words], at most 1: a word's attention in the region over that in the whole picture.

    maps [..., heads, h, w, words], region [..., heads, cells, words]. words: bool [..., words], those that may be
    damped; None: all.
    """
    whole = maps.mean((-3, -2))
    found = (region.mean(-2) / whole.clamp(min=1e-12)).clamp(max=1)
    return found if words is None else torch.where(words[..., None, :].to(found.device), found, 1)


def c_upscale(model: Any) -> Handle:
    """Put the attention of C-Upscale into a pipeline or model with cross attention to words.

    Nothing changes until `handle.method.whole()` and `handle.method.regions(...)` say what a forward is;
    `glocal.adapt.c_upscale_run.upscale` does all of that. Raises ValueError for a model without cross attention.
    """
    return attach(model, CUpscale())
