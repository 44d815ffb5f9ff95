"""Pipelines of diffusers as hosts: their denoising models, and what the models cannot know - how many steps a run has,
which expert is at work, and the place between two forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from glocal.adapt.host import Undo, Wrapper
from glocal.adapt.records import RunState

COMPONENTS = ("transformer", "transformer_2", "unet")


def is_pipeline(model: Any) -> bool:
    """Whether `model` holds denoising models and a scheduler."""
    return not isinstance(model, nn.Module) and hasattr(model, "scheduler") and bool(parts(model))


def parts(pipe: Any) -> dict[str, nn.Module]:
    """The denoising models of a pipeline by component name."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: m for name, m in found.items() if isinstance(m, nn.Module)}


def watch_run(pipe: Any, state: RunState) -> Undo:
    """A run starts where the scheduler is given its timesteps."""

    def started(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)  # pipelines read the signature
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            state.begin()
            return original(*args, **kwargs)

        return set_timesteps

    return _replace(pipe.scheduler, "set_timesteps", started)


def name_expert(module: nn.Module, name: str, state: RunState) -> Undo:
    """`state.expert` says which component runs; call it before the host watches the component."""

    def before(*_: Any) -> None:
        state.expert = name

    return module.register_forward_pre_hook(before).remove


def count_steps(pipe: Any, module: nn.Module, state: RunState) -> Undo:
    """`state.total` says how many steps the run has; call it after the host watches the component."""

    def before(*_: Any) -> None:
        if state.step == 0 and state.call == 0:
            state.total = steps_of(pipe)

    return module.register_forward_pre_hook(before).remove


def steps_of(pipe: Any) -> int | None:
    """Distinct noise levels of the run that begins: the last `num_timesteps` of the scheduler's (a run from a given
    image leaves the first ones out); None before the scheduler has any.
    """
    timesteps = getattr(pipe.scheduler, "timesteps", None)
    if timesteps is None:
        return None
    timesteps = torch.as_tensor(timesteps)
    count = getattr(pipe, "_num_timesteps", None)
    last = timesteps if not count else timesteps[-count:]
    return len(torch.unique(last))


def wrap_step(pipe: Any, wrapper: Callable[[Wrapper], Wrapper]) -> Undo:
    """Replace the scheduler's step: ``(model_output, timestep, sample, ...)`` -> the next latents."""
    return _replace(pipe.scheduler, "step", lambda original: wraps(original)(wrapper(original)))


def _replace(owner: Any, name: str, wrapper: Callable[[Wrapper], Wrapper]) -> Undo:
    """Put ``wrapper(owner.name)`` on the instance; the undo leaves its attributes as they were."""
    had, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, wrapper(original))

    def undo() -> None:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    return undo
