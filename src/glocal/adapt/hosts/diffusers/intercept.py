"""The attention call inside a processor of diffusers, made replaceable for one module.

A processor projects, normalises, rotates, calls attention and projects back, all in its `__call__`. `Slot` puts a twin
of the processor into the module: same class (as a base), same attributes, same code, only the name of the attention
function in that code leads to the slot. Nothing outside the module is touched, neither the processor nor the registry
of attention backends, and whatever the processor does around the call stays its own.

Twins of one class of processors share a class and its code, so that torch.compile compiles them once for all modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from threading import local
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.adapt.records import Core, SiteCall


@dataclass(frozen=True, eq=False)
class NativeCall:
    """The host's own attention call.

    attend(q, k, v): the call with its mask, scale and backend; [B, H, N, D] each -> [B, H, N, D].
    mask: its attention mask. number: calls of the same run of the processor before this one.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    mask: Tensor | None
    number: int


def stock(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
    """The core that is there from the start: the host's own call."""
    return call.native.attend(q, k, v)


Describe = Callable[[Tensor, Tensor, NativeCall], SiteCall | None]


class Slot:
    """The place of attention in one module. `core` stands there; `describe(q, k, native)` makes the record it is
    given, or None for a call that is not the site's.
    """

    def __init__(self, module: nn.Module, describe: Describe) -> None:
        self.core: Core = stock
        self.users = 0
        self._describe = describe
        self._original = module.processor
        self._twin = _twin(self._original, self)

    def receive(self, q: Tensor, k: Tensor, v: Tensor, native: NativeCall) -> Tensor:
        """One attention call of the processor; [B, H, N, D] each -> [B, H, N, D]."""
        call = self._describe(q, k, native)
        return native.attend(q, k, v) if call is None else self.core(q, k, v, call)

    def enter(self, module: nn.Module) -> None:
        """One more user; the first one puts the twin in."""
        if self.users == 0:
            module.processor = self._twin
            _SLOTS[module] = self
        self.users += 1

    def leave(self, module: nn.Module) -> None:
        """One user less; the last one puts the very processor back that was found."""
        self.users -= 1
        if self.users == 0:
            module.processor = self._original
            del _SLOTS[module]


_SLOTS: WeakKeyDictionary[nn.Module, Slot] = WeakKeyDictionary()


def slot_of(module: nn.Module, describe: Describe) -> Slot:
    """The slot of a module: the one that is in use, else a new one that is not in yet."""
    found = _SLOTS.get(module)
    return Slot(module, describe) if found is None else found


class _Running(local):
    """The slot whose processor runs in this thread, and its attention calls so far."""

    slot: Slot | None = None
    calls: int = 0

    def receive(
        self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], mask: Tensor | None
    ) -> Tensor:
        """Hand a call on to the slot."""
        assert self.slot is not None
        native = NativeCall(attend, mask, self.calls)
        self.calls += 1
        return self.slot.receive(q, k, v, native)


_RUNNING = _Running()


def _twin(processor: Any, slot: Slot) -> Any:
    """A processor like `processor` whose attention goes through `slot`."""
    twin = object.__new__(_twins(type(processor)))
    twin.__dict__ = processor.__dict__  # shared: a backend set on either is set on both
    object.__setattr__(twin, "_glocal_slot", slot)
    return twin


@cache
def _twins(kind: type) -> type:
    """The class of the twins of processors of class `kind`; each one has its slot.

    Raises ValueError if its code calls neither dispatch_attention_fn nor F.scaled_dot_product_attention by name.
    """
    call: Any = kind.__call__
    names = call.__code__.co_names if isinstance(call, FunctionType) else ()
    if isinstance(call, FunctionType) and "dispatch_attention_fn" in names:
        code = _rebound(call, {"dispatch_attention_fn": _tokens_first(call.__globals__)})
    elif isinstance(call, FunctionType) and {"F", "scaled_dot_product_attention"} <= set(names):
        code = _rebound(call, {"F": _Functional()})
    else:
        raise ValueError(
            f"processor {kind.__module__}.{kind.__qualname__} hides its attention; legal: one whose __call__ calls "
            "dispatch_attention_fn or F.scaled_dot_product_attention. Set the stock processor of the model before "
            "attaching."
        )

    @wraps(call)  # some attention modules read the signature to learn which arguments a processor takes
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _RUNNING.slot, _RUNNING.calls
        _RUNNING.slot, _RUNNING.calls = self._glocal_slot, 0
        try:
            return code(self, *args, **kwargs)
        finally:
            _RUNNING.slot, _RUNNING.calls = before

    # Which slot runs is no constant of a compiled graph; the code of the processor is compiled all the same.
    counted = torch.compiler.disable(counted, recursive=False)  # type: ignore[assignment]
    own = {"__call__": counted, "__module__": kind.__module__, "__slots__": ("_glocal_slot",)}
    return type(kind.__name__, (kind,), own)


def _rebound(function: FunctionType, names: dict[str, Any]) -> Callable[..., Any]:
    """`function` with other meanings of some global names."""
    # Without the name of the module, torch.compile reads these globals instead of that module's.
    scope = {k: v for k, v in function.__globals__.items() if k != "__name__"} | names
    twin = FunctionType(_own(function.__code__), scope, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _own(code: CodeType) -> CodeType:
    """A copy of a code object and of those inside it: torch.compile keeps what it compiled there, and looks for it in
    the globals of the function that it compiled.
    """
    return code.replace(co_consts=tuple(_own(c) if isinstance(c, CodeType) else c for c in code.co_consts))


def _tokens_first(names: dict[str, Any]) -> Callable[..., Tensor]:
    """In place of the `dispatch_attention_fn` among the globals `names`; [B, N, H, D] each."""

    def dispatch(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = names["dispatch_attention_fn"](*(t.transpose(1, 2) for t in (q, k, v)), attn_mask, *args, **kwargs)
            return out.transpose(1, 2)  # [B, N, H, D] -> [B, H, N, D]

        q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # [B, N, H, D] -> [B, H, N, D]
        return _RUNNING.receive(q, k, v, attend, attn_mask).transpose(1, 2)  # [B, N, H, D]

    return torch.compiler.disable(dispatch)  # type: ignore[return-value]


def _heads_first(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """In place of scaled_dot_product_attention; [B, H, N, D] each."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, *args, **kwargs)

    return _RUNNING.receive(query, key, value, attend, attn_mask)


class _Functional:
    """torch.nn.functional with another scaled_dot_product_attention."""

    def __init__(self) -> None:
        self.scaled_dot_product_attention = torch.compiler.disable(_heads_first)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)
