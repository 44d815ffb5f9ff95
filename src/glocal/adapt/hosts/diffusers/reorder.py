"""Media tokens taken through all blocks of a model in another order: permuted once on the way in, with their rotary
table, and put back once behind the last block (Rectified SpaAttn, arXiv 2511.19835, runs along a Gilbert curve so).

Every computation between the blocks' attentions is for each token alone, so the model's output is that of the raster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from glocal._kept import ordinary
from glocal.adapt.hosts.diffusers.running import Forward, canvas_of
from glocal.canvas import Canvas, Order


@dataclass(frozen=True)
class Stream:
    """Where media tokens enter and leave.

    enter: path of the first block. leave: path of the module behind the last one; the media tokens are the
    `hidden_states` of the one and the first argument of the other. rotary: path of the module that makes the rotary
    table (a tuple of tensors), its axis of tokens is `axis`; "" if the table is an argument `rotary_argument` of the
    model. text_first: the table begins with the text. arguments: further arguments of the model with one row for each
    media token (tensors or lists of them, tokens on axis 1). levels: path of the blocks, where their time embedding has
    a row for each token.
    """

    enter: str
    leave: str
    rotary: str = ""
    axis: int = 0
    rotary_argument: str = ""
    text_first: bool = False
    arguments: tuple[str, ...] = ()
    levels: str = ""


@dataclass(frozen=True, eq=False)
class _Now:
    """The order of the forward that runs: where each place takes its token from, and where each token went."""

    gather: Tensor
    back: Tensor
    before: int  # text tokens in front of the media in the rotary table


def reorder(
    model: Any,
    stream: Stream,
    choose: Callable[[tuple[int, ...]], Order | None],
    taken: Callable[[], Forward],
    told: Callable[[Forward | None], None],
) -> Callable[[], None]:
    """Install the hooks; the call that is returned takes them out.

    choose: axes of the media grid -> order of its tokens, None to leave a forward alone. taken: the record of the
    forward that runs; told: takes the record in whose layout the media tokens are a flat run in the new order, None
    where a forward is left alone. Raises ValueError, when a forward runs, for a canvas of several grids or none.
    """
    now: list[_Now | None] = [None]

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        forward = taken()
        canvas = forward.layout.q
        if len(canvas.grids) != 1:
            raise ValueError(
                f"{type(model).__name__}: tokens lie on {canvas!r}; only those of one grid can be reordered."
            )
        order = choose(canvas.grid.axes)
        if order is None:
            now[0] = None
            told(None)
            return args, kwargs
        gather, back = _both(order, canvas.grid.tokens, str(forward.latents.device))
        before = canvas.parts[0].tokens if stream.text_first and not canvas.parts[0].is_grid else 0
        now[0] = _Now(gather, back, before)
        flat = _flat(canvas, order.name)
        told(replace(forward, layout=replace(forward.layout, q=flat, kv=flat), raster=forward.layout))
        kwargs = dict(kwargs)
        for name in (*stream.arguments, stream.rotary_argument):
            if name and kwargs.get(name) is not None:
                axis = stream.axis if name == stream.rotary_argument else 1
                kwargs[name] = _each(kwargs[name], lambda t, axis=axis: t.index_select(axis, gather))
        return args, kwargs

    def rotary(module: Any, args: tuple[Any, ...], out: Any) -> Any:
        here = now[0]
        return out if here is None else _each(out, lambda t: _behind(t, stream.axis, here))

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        here = now[0]
        if here is None:
            return args, kwargs
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"].index_select(1, here.gather)}
        return (args[0].index_select(1, here.gather), *args[1:]), kwargs

    def leave(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        here = now[0]
        return args if here is None else (args[0].index_select(1, here.back), *args[1:])

    def level(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        here = now[0]
        if here is not None:
            args = tuple(_token_levels(a, here.gather) for a in args)
            kwargs = {k: _token_levels(v, here.gather) if k == "temb" else v for k, v in kwargs.items()}
        return args, kwargs

    off = torch.compiler.disable  # the order of this forward is no constant of a compiled graph
    hooks = [
        model.register_forward_pre_hook(off(begin), with_kwargs=True),
        model.get_submodule(stream.enter).register_forward_pre_hook(off(enter), with_kwargs=True),
        model.get_submodule(stream.leave).register_forward_pre_hook(off(leave)),
    ]
    if stream.rotary:
        hooks.append(model.get_submodule(stream.rotary).register_forward_hook(off(rotary)))
    if stream.levels:
        blocks: Any = model.get_submodule(stream.levels)
        hooks += [block.register_forward_pre_hook(off(level), with_kwargs=True) for block in blocks]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def _token_levels(value: Any, gather: Tensor) -> Any:
    """A time embedding [B, N, 6, C] in the new order; everything else as it is."""
    if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == gather.numel():
        return value.index_select(1, gather)
    return value


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(v, change) for v in value)


def _behind(table: Tensor, axis: int, now: _Now) -> Tensor:
    """A rotary table whose media rows follow `now.before` rows of text."""
    text = table.narrow(axis, 0, now.before)
    media = table.narrow(axis, now.before, now.gather.numel()).index_select(axis, now.gather)
    rest = table.narrow(axis, now.before + now.gather.numel(), table.shape[axis] - now.before - now.gather.numel())
    return torch.cat([text, media, rest], axis) if now.before or rest.shape[axis] else media


@lru_cache(maxsize=32)
@ordinary()
def _both(order: Order, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    back = order.inverse(tokens)
    return order.gather.to(device), back.to(device)


@lru_cache(maxsize=64)
def _flat(canvas: Canvas, name: str) -> Canvas:
    return canvas_of(*((p.name, p.tokens) for p in canvas.parts), arrives=name)
