"""Methods a recipe can name: a system with parameters, made into a pattern or a router for any canvas. Any system
composes with any order of the tokens and with rectification.

Extents are ``{"tokens": n}`` or ``{"fraction": x}`` of an axis, so that a recipe carries over to other canvases.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from glocal._errors import check_choice
from glocal.adapt.records import SiteCall
from glocal.advise.correction import BestShares, Rectified, groups_of, looked_at, rectified
from glocal.advise.masks import static_plan
from glocal.canvas import Canvas, Layout, Order, named, raster, tile
from glocal.ops import Score, attend
from glocal.patterns import (
    Causal,
    CausalWindow,
    Dense,
    Neighborhood,
    Pattern,
    RadialBlocks,
    RadialTokens,
    Sinks,
    TileWindows,
    Windows,
    frame,
)
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan
from glocal.plan.selection import plan_selection
from glocal.routing.keep import Keep
from glocal.routing.route import PooledTopK
from glocal.routing.skip_softmax import SkipSoftmax

Kind = Literal["pattern", "route", "masks"]
CORRECTIONS = ("none", "rectified")


@dataclass(frozen=True)
class MethodSpec:
    """One method of a recipe.

    system: a key of `SYSTEMS`. params: its parameters in JSON values. order: token order of the blocks, {"tile":
    [extent per axis]}, a name of `glocal.canvas.named` ("raster", "gilbert", "wht" for an axis permutation), or "heads"
    where masks say it head by head. block: query and key block in tokens. correction: "rectified" scales the output and
    fills it up with means of what was dropped (`advise.correction`). resolution: "free" runs on any canvas, "exact" on
    its own only. backend: kernels it was timed with, in order of preference. masks: file of static masks (kind
    "masks"); a recipe keeps its name and finds it beside itself.
    """

    system: str
    params: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Any] | str = "raster"
    block: tuple[int, int] = (64, 64)
    kind: Kind = "pattern"
    version: int = 1
    correction: str = "none"
    resolution: Literal["free", "exact"] = "free"
    backend: tuple[str, ...] = ("auto",)
    masks: str | None = None

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            near = get_close_matches(self.system, SYSTEMS, n=1, cutoff=0.0)
            raise ValueError(
                f"methods: system={self.system!r} is unknown; legal: {', '.join(SYSTEMS)}; nearest: {near[0]}."
            )
        check_choice("methods: kind", self.kind, get_args(Kind))
        if self.correction not in CORRECTIONS:
            raise ValueError(f"methods: correction={self.correction!r}; legal: {', '.join(CORRECTIONS)}.")
        if self.correction != "none" and (self.kind == "masks" or self.causal or self.block[0] != self.block[1]):
            raise ValueError(
                f"methods: {self.system} with correction={self.correction!r}; legal: patterns and routers of sites "
                "that are not causal, with query and key blocks of one size."
            )
        if (self.kind == "masks") != (self.masks is not None):
            raise ValueError(f"methods: kind={self.kind!r} with masks={self.masks!r}; legal: kind 'masks' with a file.")
        unknown = set(self.params) - set(SYSTEMS[self.system].params)
        if unknown:
            legal = ", ".join(SYSTEMS[self.system].params) if SYSTEMS[self.system].params else "none"
            raise ValueError(
                f"methods: parameter {sorted(unknown)[0]!r} of system {self.system!r} is unknown; legal: {legal}."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for `recipe.json`."""
        data = asdict(self)
        data["block"], data["backend"] = list(self.block), list(self.backend)
        data["masks"] = None if self.masks is None else Path(self.masks).name
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> MethodSpec:
        """The inverse of `to_json`; ValueError names an unknown field."""
        legal = list(MethodSpec.__dataclass_fields__)
        for name in data:
            if name not in legal:
                near = get_close_matches(name, legal, n=1, cutoff=0.0)[0]
                raise ValueError(f"methods: field {name!r} is unknown; legal: {', '.join(legal)}; nearest: {near}.")
        values = dict(data)
        values["block"], values["backend"] = tuple(data["block"]), tuple(data["backend"])
        return MethodSpec(**values)

    @property
    def id(self) -> str:
        """System and a short content hash."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return f"{self.system}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def words(self) -> str:
        """One line for people."""
        params = ", ".join(f"{k}={_short(v)}" for k, v in sorted(self.params.items()))
        named = f"{self.system}({params})" if params else self.system
        return named if self.correction == "none" else f"{named} {self.correction}"

    def orders(self, canvas: Canvas) -> Order:
        """The token order of its blocks on `canvas`."""
        if isinstance(self.order, str):
            return _named(canvas, self.order, self.block[0])
        return tile(canvas, tuple(int(n) for n in self.order["tile"]))

    def pattern(self, layout: Layout) -> Pattern | None:
        """The pattern on `layout`; None for a router."""
        return SYSTEMS[self.system].build(self, layout) if self.kind == "pattern" else None

    def plan(
        self,
        layout: Layout,
        q: Tensor | None = None,
        k: Tensor | None = None,
        scale: float | None = None,
        call: SiteCall | None = None,
    ) -> BlockPlan:
        """The plan of a call; a router needs its q and k [B, H, N, D], and the scale of the logits (None: D ** -0.5),
        masks the call itself. Raises ValueError where it does not fit.
        """
        if self.kind == "masks":
            if call is None or q is None or self.masks is None:
                raise ValueError(f"{self.words()} has masks for layers and steps: its plan needs the call and its q.")
            return static_plan(self.masks, call, str(q.device))
        pattern = self.pattern(layout)
        order = self.orders(layout.kv)
        if pattern is not None:
            device = q.device if q is not None else "cpu"
            return plan(pattern, layout, PlanSpec(*self.block, q_order=order, kv_order=order), device=device)
        if q is None or k is None:
            raise ValueError(f"{self.words()} is a router: its plan needs q and k.")
        router = self.router(layout)
        if isinstance(router, BestShares):
            return router.plan(q, k, layout, scale)
        if isinstance(router, SkipSoftmax):
            return plan_selection(router.select(q, k, layout, scale), device=q.device)
        return plan_selection(router.select(q, k, layout), device=q.device)

    def router(self, layout: Layout) -> PooledTopK | SkipSoftmax | BestShares:
        """The router on `layout`."""
        if self.kind != "route":
            raise ValueError(f"{self.words()} is a pattern, not a router.")
        if self.system == "rectified_spaattn":
            return BestShares(self.orders(layout.kv), **{name: float(n) for name, n in self.params.items()})
        if self.system == "skip_softmax":
            return SkipSoftmax(self.orders(layout.kv), skip_threshold(self.params, layout.nk))
        keep = Keep(ratio=float(self.params["keep"]), at_least=1)
        if not self.causal:
            return PooledTopK(self.orders(layout.kv), keep)
        return PooledTopK(self.block[0], keep, kv_block=self.block[1], within=Causal(), own=layout.nq == layout.nk)

    @property
    def causal(self) -> bool:
        """Whether it is for sites that see no later token."""
        return SYSTEMS[self.system].causal

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, BlockPlan, str]:
        """out, the plan it ran on and the kernel's name. ValueError for a method of causal sites elsewhere, and the
        other way round.
        """
        if self.causal != call.site.causal:
            raise ValueError(
                f"{self.words()} is {'for causal sites' if self.causal else 'not causal'}, but {call.site.name!r} is "
                f"{'causal' if call.site.causal else 'not'}."
            )
        built = self.plan(call.layout, q, k, call.site.scale, call)
        score = Score(scale=call.site.scale, softcap=call.site.softcap)
        # The plan may be an older one of the same canvas: what is valid of it is said by the layout of this call.
        done = attend(q, k, v, built, canvas=call.layout, score=score, backend=self.backend[0])
        after = self.rectified(q, k, v, built, call)
        return done.out if after is None else after.apply(done.out), built, done.picked.name

    def rectified(self, q: Tensor, k: Tensor, v: Tensor, built: BlockPlan, call: SiteCall) -> Rectified | None:
        """What is done to the output of a plan it made for q, k, v [B, H, N, D]; None without correction."""
        if self.correction == "none":
            return None
        groups = groups_of(call.layout.kv, self.orders(call.layout.kv), str(q.device))
        return rectified(looked_at(q, k, call.layout, groups, call.site.scale), v, built, groups)


@lru_cache(maxsize=64)
def _named(canvas: Canvas, name: str, block: int) -> Order:
    """An order by name, the same object every time."""
    return raster(canvas, block) if name == "raster" else named(canvas, name, block=block)


@dataclass(frozen=True)
class System:
    """How a system of a recipe is made. params: legal parameter names. causal: for sites that see no later token."""

    params: tuple[str, ...]
    build: Callable[[MethodSpec, Layout], Pattern]
    causal: bool = False


def extent(value: Mapping[str, float] | int, length: int, *, unit: int = 1, odd: bool = False) -> int:
    """An extent in units of `unit` tokens on an axis of `length`: from 1 to the axis, rounded (to odd if asked)."""
    most = -(-length // unit)
    if isinstance(value, int):
        wanted = float(value) / unit
    elif "tokens" in value:
        wanted = float(value["tokens"]) / unit
    else:
        wanted = float(value["fraction"]) * most  # units, so that 1.0 is the whole axis
    found = max(1, min(most, round(wanted)))
    if odd and found % 2 == 0 and found < most:
        found += 1 if wanted >= found else -1
    return found


def _grid(layout: Layout) -> tuple[int, ...]:
    return layout.kv.grid.axes


def _neighborhood(spec: MethodSpec, layout: Layout) -> Pattern:
    shape = _grid(layout)
    window = tuple(extent(w, n) for w, n in zip(spec.params["window"], shape, strict=True))
    stride = tuple(min(int(s), w) for s, w in zip(spec.params.get("stride", [1] * len(shape)), window, strict=True))
    return Neighborhood(window, stride=stride)


def _tile_windows(spec: MethodSpec, layout: Layout) -> Pattern:
    shape = _grid(layout)
    tiles = tuple(int(t) for t in spec.params["tile"])
    windows = tuple(extent(w, n, unit=t) for w, n, t in zip(spec.params["window"], shape, tiles, strict=True))
    local: Pattern = TileWindows(tiles, windows)
    return local | frame(0) if spec.params.get("first_frame", False) else local


def _windows(spec: MethodSpec, layout: Layout) -> Pattern:
    size = tuple(extent(w, n) for w, n in zip(spec.params["size"], _grid(layout), strict=True))
    return Windows(size=size)


def _radial(spec: MethodSpec, layout: Layout) -> Pattern:
    if spec.params.get("form", "tokens") == "tokens":
        return RadialTokens(sink=bool(spec.params.get("sink", True)))
    return RadialBlocks(
        block=spec.block[0], decay=float(spec.params.get("decay", 1.0)), model=spec.params.get("model", "wan")
    )


def _causal_window(spec: MethodSpec, layout: Layout) -> Pattern:
    """The last tokens, and the first ones as sinks (arXiv 2309.17453)."""
    recent = CausalWindow(extent(spec.params["window"], layout.kv.size))
    sinks = int(spec.params.get("sinks", 0))
    return recent | (Sinks(sinks) & Causal()) if sinks else recent


def _causal(spec: MethodSpec, layout: Layout) -> Pattern:
    return Causal()


def _dense(spec: MethodSpec, layout: Layout) -> Pattern:
    return Dense()


SYSTEMS: dict[str, System] = {
    "dense": System((), _dense),
    "gna": System(("window", "stride"), _neighborhood),
    "tile_windows": System(("tile", "window", "first_frame"), _tile_windows),
    "windows": System(("size",), _windows),
    "radial": System(("form", "sink", "decay", "model"), _radial),
    "pooled_topk": System(("keep",), _dense),
    "skip_softmax": System(("threshold", "threshold_scale_factor"), _dense),
    "rectified_spaattn": System(("drop", "mass"), _dense),
    "paro": System(("density",), _dense),
    "causal_window": System(("window", "sinks"), _causal_window, causal=True),
    "causal_topk": System(("keep",), _causal, causal=True),
}


def skip_threshold(params: Mapping[str, Any], keys: int) -> float:
    """The threshold of skip-softmax: as given, or a factor over the number of keys."""
    if "threshold" in params:
        return min(float(params["threshold"]), 1.0)
    return min(float(params["threshold_scale_factor"]) / keys, 1.0)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        name, number = next(iter(value.items()))
        return f"{number:g}" + ("t" if name == "tokens" else "")
    if isinstance(value, (list, tuple)):
        return "x".join(_short(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def candidates(
    shape: Sequence[int], *, tile_shape: Sequence[int] | None = None, causal: bool = False
) -> list[MethodSpec]:
    """Methods worth probing on a grid of axis lengths `shape`: tile windows of several densities along every axis,
    neighbourhoods, radial bands, pooled top-k and the best shares, the last ones and some windows rectified; all on one
    token order so that one probe serves all. For causal sites: windows of the last tokens with sinks, and top-k of
    earlier blocks. `advise.calibrated` makes those that have to be calibrated.
    """
    if causal:
        return _causal_candidates()
    tiles = tuple(tile_shape) if tile_shape is not None else default_tile(shape)
    order = {"tile": list(tiles)}
    size = int(torch.tensor(tiles).prod())
    block = (size, size)
    found: list[MethodSpec] = []
    for fractions in _splits(len(shape)):
        window = [{"fraction": f} for f in fractions]
        found.append(MethodSpec("tile_windows", {"tile": list(tiles), "window": window}, order, block))
    local = [{"fraction": 0.5}] * len(shape)
    found.append(MethodSpec("tile_windows", {"tile": list(tiles), "window": local, "first_frame": True}, order, block))
    found.append(MethodSpec("gna", {"window": local, "stride": list(tiles)}, order, block))
    if len(shape) > 1:
        found.append(MethodSpec("radial", {"form": "tokens"}, order, block))
    for keep in (0.125, 0.25, 0.5):
        found.append(MethodSpec("pooled_topk", {"keep": keep}, order, block, kind="route"))
    for drop in (0.875, 0.75, 0.5):
        found.append(
            MethodSpec("rectified_spaattn", {"drop": drop}, order, block, kind="route", correction="rectified")
        )
    if len(shape) > 1:
        found.append(MethodSpec("radial", {"form": "tokens"}, order, block, correction="rectified"))
    return found


def _causal_candidates() -> list[MethodSpec]:
    windows = [{"window": {"fraction": f}, "sinks": 64} for f in (0.0625, 0.125, 0.25, 0.5)]
    found = [MethodSpec("causal_window", window) for window in windows]
    return found + [MethodSpec("causal_topk", {"keep": keep}, kind="route") for keep in (0.0625, 0.125, 0.25, 0.5)]


def _splits(rank: int) -> list[tuple[float, ...]]:
    """Window fractions per axis, from an eighth to half of all pairs."""
    if rank == 1:
        return [(0.125,), (0.25,), (0.5,)]
    whole = [1.0] * rank
    out: list[tuple[float, ...]] = []
    for axis in range(rank):
        for share in (0.25, 0.5):
            out.append(tuple(share if a == axis else w for a, w in enumerate(whole)))
        out.append(tuple(1.0 if a == axis else 0.5 for a in range(rank)))
    out.append(tuple(0.75 for _ in whole))
    out.append(tuple(0.5 for _ in whole))
    return list(dict.fromkeys(out))


def default_tile(shape: Sequence[int], size: int = 64) -> tuple[int, ...]:
    """The squarest box of `size` tokens (a power of two) that fits a grid."""
    tiles = [1] * len(shape)
    while int(torch.tensor(tiles).prod()) < size:
        open_axes = [a for a, n in enumerate(shape) if tiles[a] * 2 <= n]
        if not open_axes:
            break
        axis = min(open_axes, key=lambda a: (tiles[a], -a))
        tiles[axis] *= 2
    return tuple(tiles)
