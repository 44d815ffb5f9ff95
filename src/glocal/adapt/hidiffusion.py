"""HiDiffusion (arXiv 2311.17528): pictures larger than a UNet was trained for, `hidiffusion(pipe)`, `handle.undo()`.

In the first steps of a run one level more is made half as large (RAU-Net), so that the deep levels see maps of the size
they know; self-attention of the largest level runs in four shifted windows at every step. No weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.adapt.attach import Handle, Method, attach
from glocal.adapt.hidiffusion_control import shrink_control
from glocal.adapt.hidiffusion_schedule import PRESETS, HiSettings, phases, recognised, stages_of
from glocal.adapt.hidiffusion_windows import window_attention
from glocal.adapt.pipelines import is_pipeline
from glocal.adapt.presets import changed_in, chosen
from glocal.adapt.records import Block, RunState, Site

_SEED = 0
_MINE = "hidiffusion"
_DOWN, _MID = "down_block_additional_residuals", "mid_block_additional_residual"  # what a ControlNet gives


class HiDiffusion(Method):
    """The method. generator: where shifts are drawn from; None: the same shifts in every run."""

    def __init__(self, settings: HiSettings, *, generator: torch.Generator | None = None) -> None:
        self.settings = settings
        self._own = generator is None
        self._generator = torch.Generator() if generator is None else generator
        self._pool = self._unpool = ""

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Self-attention of the largest level that has any."""
        wanted = self.settings.places.windows if self.settings.window_attention else ()
        return tuple(s for s in sites if s.kind == "self" and s.name.startswith(tuple(f"{w}." for w in wanted)))

    def blocks(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """Stages, what lies around attention, and the downsampler that strides. ValueError for a UNet without one."""
        places = self.settings.places
        stages = [b.name for b in blocks if b.role in ("down", "up")]
        if not stages:
            raise ValueError("hidiffusion: the model has no stages; legal: a UNet.")
        taken = set(stages)
        if places.strided is not None:
            taken.add(f"{places.strided}.downsamplers.0")
        missing = [
            n for n in (*places.windows, places.pooled, places.unpooled, *taken) if n not in {b.name for b in blocks}
        ]
        if missing:
            raise ValueError(f"hidiffusion: the model has no {missing[0]!r}; its stages: {', '.join(stages)}.")
        pools, unpools = (_transformers(blocks, stage) for stage in (places.pooled, places.unpooled))
        if len(unpools) != len(pools) + 1:
            raise ValueError(
                f"hidiffusion: pooled={places.pooled!r} has {len(pools)} transformers, unpooled={places.unpooled!r} "
                f"{len(unpools)}; legal: n and n + 1 (the last one takes the skip of the stage above)."
            )
        self._pool, self._unpool = pools[0], unpools[-2]
        taken |= {self._pool, self._unpool}
        if self.settings.window_attention:
            taken.update(n for stage in places.windows for n in _transformers(blocks, stage))
        return tuple(b for b in blocks if b.name in taken)

    def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
        """What stands in place of an attention module, a stage, a downsampler, or the transformer of a level."""
        if isinstance(site, Site):
            return self._windowed(original, site, state)
        made = {"down": _noting, "up": _forcing, "downsampler": self._strided, "transformer": self._around}
        return made[site.role](original, site, state)

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """The model's forward; what a ControlNet adds is kept for the stages, whose maps may be smaller."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._decide(state)
            down, mid = kwargs.get(_DOWN), kwargs.get(_MID)
            if down is not None and mid is not None:
                kwargs |= {_DOWN: None, _MID: None}
                early = state.total is None or state.step < self.settings.control_share * state.total
                state.store[_MINE, "control"] = (list(down), mid) if early else None
            return original(*args, **kwargs)

        return _eager(run)

    def draw(self, state: RunState) -> float:
        """A number in [0, 1) for one site and step."""
        if self._own and (_MINE, "seeded") not in state.store:
            self._generator.manual_seed(_SEED)
            state.store[_MINE, "seeded"] = True
        return float(torch.rand(1, generator=self._generator, device=self._generator.device))

    def _decide(self, state: RunState) -> None:
        """Which parts act in this forward."""
        state.store[_MINE, "control"] = None
        state.store[_MINE, "pooled"] = None
        if not self.settings.raunet:
            state.store[_MINE, "acts"] = (False, False)
            return
        if state.total is None:
            raise ValueError(
                "hidiffusion: steps=None: nobody says how many steps the run has, and the schedule counts in shares of "
                "them. Attach to the pipeline, give hidiffusion(unet, steps=...), or switch it off with raunet=False."
            )
        height, width = state.forward.latents.shape[-2:]
        plan = phases(self.settings, (height, width), state.total)
        state.store[_MINE, "acts"] = (state.step in plan.strided, state.step in plan.pooled)

    def _strided(self, original: Callable[..., Any], block: Block, state: RunState) -> Callable[..., Any]:
        """The downsampler, with twice its stride, padding and dilation while it acts."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not state.store[_MINE, "acts"][0]:
                return original(*args, **kwargs)
            with _doubled(block.module):
                return original(*args, **kwargs)

        return _eager(run)

    def _around(self, original: Callable[..., Any], block: Block, state: RunState) -> Callable[..., Any]:
        """The transformer of a level: its map is noted for the windows, pooled or restored behind it."""
        pools, unpools = block.name == self._pool, block.name == self._unpool

        def run(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            state.store[_MINE, "grid"] = tuple(x.shape[-2:])
            out = original(*args, **kwargs)
            if pools and state.store[_MINE, "acts"][1]:
                state.store[_MINE, "pooled"] = tuple(x.shape[-2:])
                return (F.avg_pool2d(out[0], 2, ceil_mode=True), *out[1:])
            size = state.store[_MINE, "pooled"]
            if unpools and size is not None:
                return (F.interpolate(out[0], size, mode="bicubic"), *out[1:])
            return out

        return _eager(run)

    def _windowed(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        """Self-attention in four windows. Rows of one step, guided or not, share the shift."""

        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            given = dict(zip(("encoder_hidden_states", "attention_mask"), args)) | kwargs
            if given.get("attention_mask") is not None:
                raise ValueError(
                    f"hidiffusion: site {site.name!r}: an attention mask arrives, which windows cannot take; legal: "
                    "None, or window_attention=False."
                )

            def attend(windows: Tensor) -> Tensor:
                return original(windows, *args, **kwargs)

            grid = state.store[_MINE, "grid"]
            return window_attention(hidden_states, grid, attend, self._quarters(site, state))

        return _eager(run)

    def _quarters(self, site: Site, state: RunState) -> int:
        found = state.store.get((site.name, _MINE))
        if found is None or found[0] != state.step:
            draw: Callable[[RunState], float] = torch.compiler.disable(self.draw)  # type: ignore[assignment]
            found = (state.step, int(4 * draw(state)))
            state.store[site.name, _MINE] = found
        return found[1]


def _eager(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` outside of compiled graphs, which would take step, draws and sizes for constants; what it calls may be in
    one.
    """
    return torch.compiler.disable(run, recursive=False)


def _transformers(blocks: tuple[Block, ...], stage: str) -> list[str]:
    return [b.name for b in blocks if b.role == "transformer" and b.name.startswith(f"{stage}.")]


@contextmanager
def _doubled(module: nn.Module) -> Iterator[None]:
    """Convolutions of `module` that stride (its own, and those of a LoRA in it) take twice the stride."""
    names = ("stride", "padding", "dilation")
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    kept = [(conv, name, getattr(conv, name)) for conv in convs for name in names]
    try:
        for conv, name, sides in kept:
            setattr(conv, name, tuple(2 * side for side in sides))
        yield
    finally:
        for conv, name, sides in kept:
            setattr(conv, name, sides)


def _noting(original: Callable[..., Any], block: Block, state: RunState) -> Callable[..., Any]:
    """A down stage; the sizes of its skips are noted."""

    def run(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if block.name == "down_blocks.0":
            state.store[_MINE, "sizes"] = [tuple(x.shape[-2:])]
        out = original(*args, **kwargs)
        state.store[_MINE, "sizes"] += [tuple(skip.shape[-2:]) for skip in out[1]]
        return out

    return _eager(run)


def _forcing(original: Callable[..., Any], block: Block, state: RunState) -> Callable[..., Any]:
    """An up stage; its upsampler gives the size of the next skip, and skips take what a ControlNet adds."""

    def run(*args: Any, **kwargs: Any) -> Any:
        skips = kwargs["res_hidden_states_tuple"]
        sizes, control = state.store[_MINE, "sizes"], state.store[_MINE, "control"]
        del sizes[-len(skips) :]
        if sizes:
            kwargs["upsample_size"] = sizes[-1]
        if control is not None:
            down, mid = control
            mine = down[-len(skips) :]
            del down[-len(skips) :]
            kwargs["res_hidden_states_tuple"] = tuple(_plus(s, r) for s, r in zip(skips, mine, strict=True))
            if block.name == "up_blocks.0":
                kwargs["hidden_states"] = _plus(kwargs["hidden_states"], mid)
        return original(*args, **kwargs)

    return _eager(run)


def _plus(skip: Tensor, residual: Tensor) -> Tensor:
    """skip and a ControlNet's residual, resized (bicubic) to it."""
    if residual.shape[-2:] != skip.shape[-2:]:
        residual = F.interpolate(residual, skip.shape[-2:], mode="bicubic")
    return skip + residual


def hidiffusion(
    model: Any,
    preset: str | None = None,
    *,
    settings: HiSettings | None = None,
    generator: torch.Generator | None = None,
    steps: int | None = None,
    **changed: Any,
) -> Handle:
    """Put HiDiffusion into a pipeline of Stable Diffusion (1.5, 2.1, XL, Turbo), or into its UNet.

    preset: of `PRESETS`; None recognises the model. settings: instead of a preset. changed: single fields of the
    settings, such as ``window_attention=False``. generator: of the random shifts; None: the same in every run.
    steps: how many steps a run has, for a UNet without a pipeline. A ControlNet of the pipeline is adapted too.
    Raises ValueError for a model that is no such UNet, a preset of another one, an unknown field.
    """
    if settings is None:
        settings = _settings(model, preset)
    settings = changed_in("hidiffusion", settings, changed)
    if not stages_of(model):
        raise ValueError(f"hidiffusion: {_seen(model)}; legal: a UNet.")
    if not settings.raunet and not settings.window_attention:
        raise ValueError("hidiffusion: raunet=False and window_attention=False leave nothing to do; legal: one True.")
    handle = attach(model, HiDiffusion(settings, generator=generator))
    if steps is not None:
        handle.state.total = steps
    controlnet = getattr(model, "controlnet", None)
    if is_pipeline(model) and isinstance(controlnet, nn.Module):
        handle.last(shrink_control(controlnet, settings.control_side))
    return handle


def _settings(model: Any, preset: str | None) -> HiSettings:
    name = recognised(model) if preset is None else preset
    if name is None:
        raise ValueError(
            f"hidiffusion: {_seen(model)} is not known; legal: a UNet of Stable Diffusion 1.5, 2.1 or XL. For another "
            "UNet give settings=."
        )
    if name in PRESETS and not PRESETS[name].fits(model):
        mine = [n for n, p in PRESETS.items() if p.fits(model)]
        raise ValueError(
            f"hidiffusion: preset={name!r} is for another UNet than this {_seen(model)}; for it: "
            f"{', '.join(mine) if mine else 'none'}."
        )
    return chosen("hidiffusion", PRESETS, model, name)


def _seen(model: Any) -> str:
    stages = stages_of(model)
    return f"{type(model).__name__} with {'stages ' + ', '.join(stages) if stages else 'no down stages'}"
