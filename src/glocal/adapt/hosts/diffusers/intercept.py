"""The attention call inside a processor of diffusers, made replaceable for one module.

A processor projects, normalises, rotates, calls attention and projects back, all in its `__call__`. `Slot` puts a twin
of the processor into the module: same class (as a base), same attributes, same code, only the name of the attention
function in that code leads to the slot. Nothing outside the module is touched, neither the processor nor the registry
of attention backends, and whatever the processor does around the call stays its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

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


Receiver = Callable[[Tensor, Tensor, Tensor, NativeCall], Tensor]


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
        self._twin = _twin(self._original, self._receive)

    def _receive(self, q: Tensor, k: Tensor, v: Tensor, native: NativeCall) -> Tensor:
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


def _twin(processor: Any, receive: Receiver) -> Any:
    """A processor like `processor` whose attention goes through `receive`.

    Raises ValueError if its code calls neither dispatch_attention_fn nor F.scaled_dot_product_attention by name.
    """
    kind = type(processor)
    call = kind.__call__
    names = call.__code__.co_names if isinstance(call, FunctionType) else ()
    calls = [0]
    if isinstance(call, FunctionType) and "dispatch_attention_fn" in names:
        found = call.__globals__["dispatch_attention_fn"]
        code = _rebound(call, {"dispatch_attention_fn": _tokens_first(found, receive, calls)})
    elif isinstance(call, FunctionType) and {"F", "scaled_dot_product_attention"} <= set(names):
        code = _rebound(call, {"F": _Functional(_heads_first(receive, calls))})
    else:
        raise ValueError(
            f"processor {kind.__module__}.{kind.__qualname__} hides its attention; legal: one whose __call__ calls "
            "dispatch_attention_fn or F.scaled_dot_product_attention. Set the stock processor of the model before "
            "attaching."
        )

    @wraps(call)  # some attention modules read the signature to learn which arguments a processor takes
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] = 0
        return code(self, *args, **kwargs)

    like = type(kind.__name__, (kind,), {"__call__": counted, "__module__": kind.__module__})
    twin = object.__new__(like)
    twin.__dict__ = processor.__dict__  # shared: a backend set on either is set on both
    return twin


def _rebound(function: FunctionType, names: dict[str, Any]) -> Callable[..., Any]:
    """`function` with other meanings of some global names."""
    # Without the name of the module, torch.compile reads these globals instead of that module's.
    scope = {k: v for k, v in function.__globals__.items() if k != "__name__"} | names
    # A code object of its own: torch.compile keeps what it compiled there, and looks for it in these globals.
    code = function.__code__.replace()
    twin = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _tokens_first(found: Callable[..., Tensor], receive: Receiver, calls: list[int]) -> Callable[..., Tensor]:
    def dispatch(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = found(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask, *args, **kwargs)  # [B, N, H, D]
            return out.transpose(1, 2)  # [B, H, N, D]

        native = NativeCall(attend, attn_mask, calls[0])
        calls[0] += 1
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # [B, N, H, D] -> [B, H, N, D]
        return receive(q, k, v, native).transpose(1, 2)  # [B, N, H, D]

    return dispatch


def _heads_first(receive: Receiver, calls: list[int]) -> Callable[..., Tensor]:
    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask, *args, **kwargs)

        native = NativeCall(attend, attn_mask, calls[0])
        calls[0] += 1
        return receive(query, key, value, native)

    return attention


class _Functional:
    """torch.nn.functional with another scaled_dot_product_attention."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)
