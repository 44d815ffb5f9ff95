"""The attention call inside a decoder of transformers, made replaceable for one module.

An attention module asks a process-wide table for its attention function, by name. `Slot` gives one module a forward
with the same code in which that table is another object, so the function that runs leads to the slot; the table itself,
the configuration and the masks the model makes stay as they are. Attention and masks are thus always those of one stock
implementation, and both are back the moment the slot is left. What a method does is decided call by call, so a compiled
model runs the attention modules between its graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import unwrap
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glocal.adapt.records import Core, SiteCall

TABLE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True, eq=False)
class NativeCall:
    """The model's own attention call.

    attend(q, k, v): the call with its mask, scale and implementation; q [B, Hq, N, D], k, v [B, Hkv, Nk, D] ->
    [B, Hq, N, D]. mask: its attention mask, None where plain causal order is meant. softcap: of the logits.
    opaque: the mask hides more than a layout says, so only the model's own function can serve the call.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    mask: Tensor | None
    softcap: float | None
    opaque: bool = False


def stock(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
    """The core that is there from the start: the model's own call."""
    return call.native.attend(q, k, v)


Describe = Callable[[Tensor, Tensor, NativeCall], SiteCall]


class Slot:
    """The place of attention in one module. `core` stands there; `describe` makes the record it is given."""

    def __init__(self, module: nn.Module, describe: Describe) -> None:
        self.core: Core = stock
        self.users = 0
        self._describe = describe
        self._twin = _twin(module, self._found)
        self._back: Callable[[], None] | None = None

    def _found(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """In place of the attention function `function` of the table."""

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            weights: list[Tensor | None] = [None]

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out, weights[0] = function(module, q, k, v, mask, **options)
                return out.transpose(1, 2)  # [B, N, H, D] -> [B, H, N, D]

            native = NativeCall(attend, mask, options.get("softcap"))
            out = self.core(query, key, value, self._describe(query, key, native))
            return out.transpose(1, 2).contiguous(), weights[0]

        return attention

    def enter(self, module: nn.Module) -> None:
        """One more user; the first one puts the twin in."""
        if self.users == 0:
            self._back = swap_forward(module, self._twin)
            _SLOTS[module] = self
        self.users += 1

    def leave(self, module: nn.Module) -> None:
        """One user less; the last one puts back what was found."""
        self.users -= 1
        if self.users == 0:
            assert self._back is not None
            self._back()
            del _SLOTS[module]


_SLOTS: WeakKeyDictionary[nn.Module, Slot] = WeakKeyDictionary()


def slot_of(module: nn.Module, describe: Describe) -> Slot:
    """The slot of a module: the one that is in use, else a new one that is not in yet."""
    found = _SLOTS.get(module)
    return Slot(module, describe) if found is None else found


class _Table:
    """The table of attention functions as one module sees it."""

    def __init__(self, table: Any, found: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._table, self._found = table, found

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return self._found(self._table.get_interface(name, default))

    def __getitem__(self, name: str) -> Callable[..., Any]:  # how the code of transformers 4 looks a function up
        return self._found(self._table[name])


def _twin(module: nn.Module, found: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., Any]:
    """The forward of `module` with another table. ValueError where its code asks no table."""
    code = unwrap(type(module).forward)
    if not isinstance(code, FunctionType) or TABLE not in code.__code__.co_names:
        kind = type(module)
        raise ValueError(
            f"attention {kind.__module__}.{kind.__qualname__} hides its attention; legal: one whose forward asks "
            f"{TABLE}."
        )
    scope = {**code.__globals__, TABLE: _Table(code.__globals__[TABLE], found)}
    twin = FunctionType(code.__code__, scope, code.__name__, code.__defaults__, code.__closure__)
    twin.__kwdefaults__ = code.__kwdefaults__
    return MethodType(torch.compiler.disable(twin), module)


def swap_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Put `forward` in place, inside the hooks that offload weights where there are some; returns what undoes it.

    Such hooks may come or go while it is there: the undo finds it where it is then.
    """
    held = module.__dict__
    at = "_old_forward" if "_hf_hook" in held else "forward"
    had, original = at in held, held.get(at)
    held[at] = forward

    def undo() -> None:
        for name in ("forward", "_old_forward"):
            if held.get(name) is not forward:
                continue
            if name == "forward" and not had:
                del held[name]
            elif had:
                held[name] = original
            else:
                held[name] = MethodType(type(module).forward, module)

    return undo
