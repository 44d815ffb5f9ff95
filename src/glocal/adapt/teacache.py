"""TeaCache (arXiv 2411.19108) as the authors of Rectified SpaAttn (arXiv 2511.19835) run it: where the time embedding's
effect on the input has changed little, all blocks are skipped and what they added last time is added again.

The change is the relative L1 distance of a signal to the one of the last forward, through a fitted polynomial; it adds
up until it passes a threshold. Each guidance branch and expert has a memory of its own, kept in the run's store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.attach import Handle, Method, attach
from glocal.adapt.presets import Preset, chosen
from glocal.adapt.records import Block, RunState, Site


@dataclass(frozen=True)
class TeaSettings:
    """polynomial: coefficients, highest power first. threshold: how much change may add up. first_steps: these are
    always computed. signal: "modulated" is the first block's normalised, modulated input, "time" the time embedding.
    """

    polynomial: tuple[float, ...]
    threshold: float
    first_steps: int = 1
    signal: str = "modulated"


_WAN14 = (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525)
_CODE = "configurations of Rectified SpaAttn"
PRESETS: Mapping[str, Preset[TeaSettings]] = {
    "hunyuanvideo": Preset(
        TeaSettings((733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896), 0.15),
        ("HunyuanVideoTransformer3DModel",),
        _CODE,
    ),
    "flux": Preset(
        TeaSettings((498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861), 0.8),
        ("FluxTransformer2DModel",),
        _CODE,
    ),
    "wan2.1-t2v-14b": Preset(TeaSettings(_WAN14, 0.2, 5, "time"), ("WanTransformer3DModel",), _CODE),
    "wan2.1-i2v-14b": Preset(TeaSettings(_WAN14, 0.3, 5, "time"), ("WanTransformer3DModel",), _CODE),
}


@dataclass(eq=False)
class _Memory:
    """Of one branch: the last signal, the change added up, what the blocks added, and whether they are skipped now."""

    signal: Tensor | None = None
    change: float = 0.0
    added: Tensor | tuple[Tensor, ...] | None = None
    skip: bool = False
    entered: Any = None


class TeaCache(Method):
    """The method. skipped, computed: forwards of each kind so far."""

    def __init__(self, settings: TeaSettings) -> None:
        self.settings = settings
        self.skipped = self.computed = 0
        self._ends: dict[str, tuple[str, str]] = {}  # component -> first and last block

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """None: it acts at blocks."""
        return ()

    def blocks(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """All transformer blocks."""
        found = tuple(b for b in blocks if b.role == "layer")
        self._ends[found[0].component] = (found[0].name, found[-1].name)
        return found

    def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
        """A block, which may be skipped."""
        assert isinstance(site, Block)
        first, last = (site.name == name for name in self._ends[site.component])

        def run(*args: Any, **kwargs: Any) -> Any:
            memory = self._memory(state, site.component)
            streams = _streams(args, kwargs)
            if first:
                memory.entered = streams
                memory.skip = self._decide(memory, site, args, kwargs, state)
                self.skipped, self.computed = self.skipped + memory.skip, self.computed + (not memory.skip)
            if not memory.skip:
                out = original(*args, **kwargs)
                if last:
                    memory.added = _each(lambda o, s: o - s, out, memory.entered, site)
                return out
            if last:
                return _each(lambda a, s: s + a, memory.added, memory.entered, site)
            return _each(lambda _, s: s, memory.added, streams, site)

        return run

    def _memory(self, state: RunState, component: str) -> _Memory:
        return state.store.setdefault((component, ("teacache", state.branch)), _Memory())

    def _decide(
        self, memory: _Memory, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], state: RunState
    ) -> bool:
        """Whether this forward is skipped; the memory moves on."""
        signal = _signal(self.settings.signal, block, args, kwargs)
        before, memory.signal = memory.signal, signal
        final = state.total is not None and state.step == state.total - 1
        if before is None or memory.added is None or state.step < self.settings.first_steps or final:
            memory.change = 0.0
            return False
        moved = float((signal - before).abs().mean() / before.abs().mean())
        for power, factor in enumerate(reversed(self.settings.polynomial)):
            memory.change += factor * moved**power
        if memory.change < self.settings.threshold:
            return True
        memory.change = 0.0
        return False


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block that matter here, by name; all families call them so, in this order."""
    return dict(zip(("hidden_states", "encoder_hidden_states", "temb"), args)) | kwargs


def _streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    named = _named(args, kwargs)
    return named["hidden_states"], named["encoder_hidden_states"]


def _signal(kind: str, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = _named(args, kwargs)
    if kind == "time":
        return named["temb"].detach().float()
    norm: Any = block.module.norm1
    if "emb" not in signature(norm.forward).parameters:
        raise ValueError(
            f"teacache: signal='modulated': {type(block.module).__name__} modulates outside its norm; legal: 'time'."
        )
    with torch.no_grad():
        found = norm(named["hidden_states"], emb=named["temb"])
    return (found[0] if isinstance(found, tuple) else found).detach().float()


def _each(change: Callable[[Tensor, Tensor], Tensor], out: Any, streams: tuple[Tensor, Tensor], block: Block) -> Any:
    """`change` of every part of a block's output and the stream that it continues; Flux gives the text first."""
    if isinstance(out, Tensor):
        return change(out, streams[0])
    ordered = streams[::-1] if type(block.module).__name__.startswith("Flux") else streams
    return tuple(change(o, s) for o, s in zip(out, ordered, strict=True))


def teacache(model: Any, preset: str | None = None, *, settings: TeaSettings | None = None) -> Handle:
    """Put TeaCache into a pipeline or model of Wan, HunyuanVideo or Flux. preset: of `PRESETS`."""
    return attach(model, TeaCache(chosen("teacache", PRESETS, model, preset) if settings is None else settings))
