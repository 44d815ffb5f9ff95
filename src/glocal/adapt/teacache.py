"""TeaCache (arXiv 2411.19108) as the authors of Rectified SpaAttn (arXiv 2511.19835) run it: where the time embedding's
effect on the input has changed little, all blocks are skipped and what they added last time is added again.

The change is the relative L1 distance of a signal to the one of the last forward, through a fitted polynomial; it adds
up until it passes a threshold. Each guidance branch and expert has a memory of its own, kept in the run's store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from glocal._errors import check_choice
from glocal.adapt.attach import Handle, Method, attach
from glocal.adapt.presets import Preset, changed_in, chosen
from glocal.adapt.records import Block, RunState, Site


@dataclass(frozen=True)
class TeaSettings:
    """polynomial: coefficients, highest power first. threshold: how much change may add up. first_steps: these are
    always computed, and with last_step the last one too, where the number of steps is known. signal: "modulated" is the
    first block's normalised, modulated input, "time" the time embedding.
    """

    polynomial: tuple[float, ...]
    threshold: float
    first_steps: int = 1
    signal: Literal["modulated", "time"] = "modulated"
    last_step: bool = True

    def __post_init__(self) -> None:
        check_choice("TeaSettings: signal", self.signal, ("modulated", "time"))
        if not self.polynomial:
            raise ValueError("TeaSettings: polynomial=() must have a coefficient; (1.0, 0.0) is the change itself.")


_WAN14 = (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525)
_WAN, _CODE = ("WanTransformer3DModel",), "configurations of Rectified SpaAttn"


def _wan(threshold: float, first_steps: int = 5, experts: int = 1) -> Preset[TeaSettings]:
    """A second expert computes its first step, as published: it has no memory yet."""
    return Preset(TeaSettings(_WAN14, threshold, first_steps, "time", last_step=False), _WAN, _CODE, experts)


def _cogvideox(*polynomial: float) -> Preset[TeaSettings]:
    return Preset(TeaSettings(polynomial, 0.2, signal="time"), ("CogVideoXTransformer3DModel",), _CODE)


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
    "wan2.1-t2v-14b": _wan(0.2),
    "wan2.1-i2v-14b": _wan(0.3),
    "wan2.2-t2v": _wan(0.2, first_steps=3, experts=2),
    "wan2.2-i2v": _wan(0.3, first_steps=3, experts=2),
    "wan2.2-ti2v-5b": _wan(0.1),
    "cogvideox1.5-t2v": _cogvideox(250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "cogvideox1.5-i2v": _cogvideox(122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
}


@dataclass(eq=False)
class _Memory:
    """Of one branch: the last signal, the change added up, what the blocks added, and whether they are skipped now."""

    signal: Tensor | None = None
    change: float = 0.0
    added: Tensor | tuple[Tensor, ...] | None = None
    skip: bool = False
    entered: Any = None


F = TypeVar("F", bound=Callable[..., Any])


def _eager(function: F) -> F:
    """`function` outside of compiled graphs."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


# Block -> its streams, media and words, as it returns them (of Wan and the built-in models media alone).
_MEDIA, _BOTH = ("hidden_states",), ("hidden_states", "encoder_hidden_states")
_STREAMS: Mapping[str, tuple[str, ...]] = {
    "WanTransformerBlock": _MEDIA,
    "HunyuanVideoTransformerBlock": _BOTH,
    "HunyuanVideoSingleTransformerBlock": _BOTH,
    "HunyuanVideoTokenReplaceTransformerBlock": _BOTH,
    "HunyuanVideoTokenReplaceSingleTransformerBlock": _BOTH,
    "CogVideoXBlock": _BOTH,
    "FluxTransformerBlock": _BOTH[::-1],
    "FluxSingleTransformerBlock": _BOTH[::-1],
    "VideoBlock": ("x",),
    "DiTBlock": _MEDIA,
}


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
        """All transformer blocks. ValueError for blocks whose arguments are not known."""
        found = tuple(b for b in blocks if b.role == "layer")
        for block in found:
            _stream_names(block)
            if self.settings.signal == "modulated" and block is found[0] and not _modulates(block):
                raise ValueError(
                    f"teacache: signal='modulated': {type(block.module).__name__} modulates outside its norm; legal: "
                    "'time'."
                )
        if found:
            self._ends[found[0].component] = (found[0].name, found[-1].name)
        return found

    def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
        """A block, which may be skipped."""
        assert isinstance(site, Block)
        first, last = (site.name == name for name in self._ends[site.component])
        names, order = _stream_names(site), list(signature(type(site.module).forward).parameters)[1:]

        def run(*args: Any, **kwargs: Any) -> Any:
            memory = self._memory(state, site.component)
            named = dict(zip(order, args)) | kwargs
            streams = tuple(named[name] for name in names)
            if first:
                memory.entered = streams
                memory.skip = self._decide(memory, _signal(self.settings.signal, site, named), state)
                self.skipped, self.computed = self.skipped + memory.skip, self.computed + (not memory.skip)
            if not memory.skip:
                out = original(*args, **kwargs)
                if last:
                    memory.added = _each(lambda o, s: o - s, out, memory.entered)
                return out
            found = streams if not last else _each(lambda a, s: s + a, memory.added, memory.entered)
            return found[0] if isinstance(found, tuple) and len(found) == 1 else found

        # Steps and what is remembered are no constants of a compiled graph; blocks are compiled all the same.
        return torch.compiler.disable(run, recursive=False)

    def _memory(self, state: RunState, component: str) -> _Memory:
        return state.store.setdefault((component, ("teacache", state.branch)), _Memory())

    @_eager
    def _decide(self, memory: _Memory, signal: Tensor, state: RunState) -> bool:
        """Whether this forward is skipped; the memory moves on."""
        before, memory.signal = memory.signal, signal
        final = self.settings.last_step and state.total is not None and state.step == state.total - 1
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


def _stream_names(block: Block) -> tuple[str, ...]:
    """The arguments of a block that it continues, in the order it returns them; ValueError for an unknown class."""
    for c in type(block.module).__mro__:
        if c.__name__ in _STREAMS:
            return _STREAMS[c.__name__]
    raise ValueError(
        f"teacache: block {block.name!r} is a {type(block.module).__name__}; legal: models of Wan, HunyuanVideo, "
        "FLUX.1 and CogVideoX, and the built-in transformers."
    )


def _modulates(block: Block) -> bool:
    """Whether the norm of a block takes the stream and the time embedding, and no more."""
    forward = getattr(getattr(block.module, "norm1", None), "forward", None)
    if forward is None:
        return False
    needed = [p.name for p in signature(forward).parameters.values() if p.default is Parameter.empty]
    return "emb" in signature(forward).parameters and set(needed[1:]) <= {"emb"}


@_eager
def _signal(kind: str, block: Block, named: Mapping[str, Any]) -> Tensor:
    if kind == "time":
        return named["modulation" if "modulation" in named else "temb"].detach().float()
    with torch.no_grad():
        found = getattr(block.module, "norm1")(named["hidden_states"], emb=named["temb"])  # noqa: B009 (for pyright)
    return (found[0] if isinstance(found, tuple) else found).detach().float()


@_eager
def _each(change: Callable[[Tensor, Tensor], Tensor], out: Any, streams: tuple[Tensor, ...]) -> Any:
    """`change` of every part of a block's output and the stream that it continues."""
    if isinstance(out, Tensor):
        return change(out, streams[0])
    return tuple(change(o, s) for o, s in zip(out, streams, strict=True))


def teacache(model: Any, preset: str | None = None, *, settings: TeaSettings | None = None, **changed: Any) -> Handle:
    """Put TeaCache into a pipeline or model of Wan, HunyuanVideo, FLUX.1 or CogVideoX, or into a built-in transformer.

    preset: of `PRESETS`; None takes the first published for the class. settings: instead of a preset. changed: single
    fields of the settings, such as ``threshold=0.1``. Raises ValueError for a preset of another class, an unknown
    field, blocks of another kind.
    """
    found = chosen("teacache", PRESETS, model, preset) if settings is None else settings
    return attach(model, TeaCache(changed_in("teacache", found, changed)))
