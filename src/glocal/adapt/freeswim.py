"""FreeSwim (arXiv 2511.14712) in Wan: video beyond the trained resolution without training; `freeswim(pipe)`.

Self-attention sees, around each query, a window of the size of the training resolution, moved inwards at borders. A
second row of the batch, the full branch, starts every step from the same latents and attends everywhere; what its cross
attention gives (before the output projection) stands in for the window row's, so that objects are not repeated. The
cached variant keeps that result for some steps and runs no full branch without guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.attach import Handle, attach, sites_of
from glocal.adapt.pipelines import is_pipeline, parts
from glocal.adapt.presets import Preset, changed_in, chosen
from glocal.adapt.records import Core, RunState, Site, SiteCall
from glocal.adapt.sparse import Ran, Relation, SparseMethod, media_grid
from glocal.ops import Score, attention
from glocal.patterns.neighborhood import Neighborhood


@dataclass(frozen=True)
class FreeSwimSettings:
    """reach: rows and columns of tokens that a query sees to each side, `reach_of(height, width)` of the training.

    cache_steps: None runs the full branch in every forward; c runs it in the guided forwards of steps 0, c, 2c, ... and
    keeps its cross attention in between, while forwards without guidance are windows alone.
    dual_steps: after so many steps windows run alone, with their own cross attention; None: never, 0: from the start.
    scale_tokens: n tokens of a trained frame; logits are scaled by sqrt(log_n(2 n) / head_dim); None: as the host.
    offload: keep what is cached in the memory of the CPU.
    """

    reach: tuple[int, int] = (15, 26)
    cache_steps: int | None = None
    dual_steps: int | None = None
    scale_tokens: int | None = 1560
    offload: bool = False

    def __post_init__(self) -> None:
        if len(self.reach) != 2 or min(self.reach) < 0:
            raise ValueError(f"freeswim: reach={self.reach!r}; legal: (rows, columns), neither negative.")
        for name, least in (("cache_steps", 1), ("dual_steps", 0), ("scale_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"freeswim: {name}={value!r} must be None or at least {least}.")

    def pattern(self, frames: int) -> Neighborhood:
        """The window of all frames, 2 reach + 1 rows and columns; a window longer than its axis sees all of it."""
        rows, columns = self.reach
        return Neighborhood((frames, 2 * rows + 1, 2 * columns + 1), border="shift", oversize="full")

    def scale(self, head_dim: int) -> float | None:
        """The factor on logits; None is the host's."""
        n = self.scale_tokens
        return None if n is None else math.sqrt(math.log(2 * n, n) / head_dim)


def reach_of(height: int, width: int) -> tuple[int, int]:
    """The published reach for a training resolution in pixels: half of its tokens of 16 x 16 pixels."""
    return height // 32, width // 32


_WAN, _SCRIPT = ("WanTransformer3DModel",), "script of the authors' repository"
_SMALL = FreeSwimSettings(reach_of(480, 832), dual_steps=50)
_LARGE = FreeSwimSettings(reach_of(720, 1280), dual_steps=50)
# The built-in image model has 4 px a token and one frame: 64 x 64 px are 16 x 16 tokens.
_DEMO = FreeSwimSettings((8, 8), scale_tokens=256)

PRESETS: Mapping[str, Preset[FreeSwimSettings]] = {
    "wan2.1-1.3b": Preset(_SMALL, _WAN, _SCRIPT, experts=1),
    "wan2.1-1.3b-cached": Preset(replace(_SMALL, cache_steps=2, dual_steps=40), _WAN, _SCRIPT, experts=1),
    "wan2.1-14b": Preset(_LARGE, _WAN, _SCRIPT, experts=1),
    "wan2.1-14b-cached": Preset(replace(_LARGE, cache_steps=2, dual_steps=40), _WAN, _SCRIPT, experts=1),
    "demo-image": Preset(_DEMO, ("ImageDiT",), "the rule of reach_of, for the built-in model"),
}


@dataclass(frozen=True)
class _Now:
    """The forward that runs: how many rows it was given, which have a full branch (behind them, in this order) or take
    what is cached, and whether the result of the full branch is kept.
    """

    rows: int
    full: tuple[int, ...] = ()
    reuse: tuple[int, ...] = ()
    keep: bool = False


class FreeSwim(SparseMethod):
    """The method: settings as given.

    full_branch: what the model gave for the full branch in the last forward, None where there was none.
    """

    def __init__(self, settings: FreeSwimSettings, *, backend: str = "auto") -> None:
        self.settings, self.backend = settings, backend
        self.full_branch: Tensor | None = None

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """All; ValueError for a model whose text is not in an attention of its own."""
        if {s.kind for s in sites} != {"self", "cross"}:
            kinds = ", ".join(sorted({s.kind for s in sites}))
            raise ValueError(f"freeswim: the model has attention of kind {kinds}; legal: self and cross attention.")
        return sites

    def relation(self, q: Tensor, k: Tensor, call: SiteCall) -> Relation:
        """The inward window of the video."""
        axes = media_grid(call, "freeswim")
        if len(axes) != 3 or not call.layout.q.parts[0].is_grid:
            raise ValueError(
                f"freeswim: site {call.site.name!r} attends on {call.layout.q!r}; legal: frames x rows x columns in "
                "raster order."
            )
        return self.settings.pattern(axes[0])

    def score(self, call: SiteCall) -> Score:
        """The published scale, in both branches."""
        scale = self.settings.scale(call.site.head_dim)
        return Score(scale=call.site.scale if scale is None else scale, softcap=call.site.softcap)

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """The model on the rows it is given and, behind them, the rows of the full branch."""

        @wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            named = dict(zip(_ARGUMENTS, args)) | kwargs
            latents: Tensor = named["hidden_states"]
            now = self._plan(state, latents)
            state.store["", _NOW] = now
            if now.full:
                order = torch.tensor([*range(now.rows), *now.full], device=latents.device)
                for name in _ARGUMENTS[:4]:
                    value = named.get(name)
                    if isinstance(value, Tensor) and value.dim() and value.shape[0] == now.rows:
                        named[name] = value.index_select(0, order.to(value.device))
            out = original(**named)
            found: Tensor = out[0]
            self.full_branch = found[now.rows :].detach() if now.full else None
            if isinstance(out, tuple):
                return (found[: now.rows], *out[1:])
            return type(out)(sample=found[: now.rows])

        # Steps and caches are no constants of a compiled graph; the model below is compiled all the same.
        return torch.compiler.disable(run, recursive=False)

    def _plan(self, state: RunState, latents: Tensor) -> _Now:
        """Which rows have a full branch in this forward."""
        rows, step, every = latents.shape[0], max(state.step, 0), self.settings.cache_steps
        if self.settings.dual_steps is not None and step >= self.settings.dual_steps:
            return _Now(rows)
        if every is None:
            return _Now(rows, full=tuple(range(rows)))
        guided = tuple(row for row, (_, branch) in enumerate(state.rows) if branch != "uncond")
        if not guided:
            return _Now(rows)
        key, fits = ("", (_NOW, state.expert)), (guided, latents.shape)
        if step % every and state.store.get(key) == fits:
            return _Now(rows, reuse=guided)
        state.store[key] = fits
        return _Now(rows, full=guided, keep=True)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """Windows for the rows of the model and dense attention for those of the full branch, [B, H, N, D] each."""
        now: _Now = call.state.store["", _NOW]
        if call.site.kind == "cross":
            return self._cross(q, k, v, call, inner)
        mine = super().core(q[: now.rows], k[: now.rows], v[: now.rows], call, inner)
        if not now.full:
            return mine
        ran: Ran = self.ran[call.site.component, call.site.name]
        ran.calls += 1
        ran.dense["full branch"] += 1
        theirs = attention(q[now.rows :], k[now.rows :], v[now.rows :], score=self.score(call))
        return torch.cat([mine, theirs])

    def _cross(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """Text: rows with a full branch take its result, of now or kept; other rows have their own."""
        now: _Now = call.state.store["", _NOW]
        key = (call.site.name, (_NOW, call.state.expert, call.native.number))  # images are a second call of the site
        taken = now.full if now.full else now.reuse
        if now.full:
            result = inner(q[now.rows :], k[now.rows :], v[now.rows :], call)
            if now.keep:
                call.state.store[key] = result.cpu() if self.settings.offload else result
        elif now.reuse:
            result = call.state.store[key].to(q.device)
        else:
            return inner(q, k, v, call)
        mine = result
        if len(taken) < now.rows:
            others = [row for row in range(now.rows) if row not in taken]
            mine = result.new_empty(now.rows, *result.shape[1:])
            mine[list(taken)] = result
            mine[others] = inner(q[others], k[others], v[others], call)
        return torch.cat([mine, result]) if now.full else mine


_NOW = "freeswim"
_ARGUMENTS = (
    "hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "return_dict",
    "attention_kwargs",
)  # fmt: skip


def freeswim(
    model: Any,
    preset: str | None = None,
    *,
    settings: FreeSwimSettings | None = None,
    backend: str = "auto",
    **changed: Any,
) -> Handle:
    """Put FreeSwim into a pipeline or model of Wan with text in cross attention, or into the built-in image model.

    preset: of `PRESETS`; None takes the one without cache for the model's size. settings: instead of a preset.
    changed: single fields of the settings, such as ``cache_steps=5``. The whole second stage is
    `glocal.adapt.freeswim_refine.refine`. Raises ValueError for another class of model, an unknown preset or field.
    """
    found = list(parts(model).values()) if is_pipeline(model) else [model]
    for part in found:
        if not any(c.__name__ in (*_WAN, "ImageDiT") for c in type(part).__mro__):
            raise ValueError(
                f"freeswim: {type(part).__name__} is no Wan; legal: {', '.join(_WAN)}, a pipeline of them, or ImageDiT."
            )
    if settings is None:
        layers = max(site.layer for site in sites_of(model)) + 1
        large = preset is None and len(found) == 1 and layers >= 40
        settings = chosen("freeswim", PRESETS, model, "wan2.1-14b" if large else preset)
    return attach(model, FreeSwim(changed_in("freeswim", settings, changed), backend=backend))
