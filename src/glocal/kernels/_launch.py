"""Starts Triton kernels: which of its compiled forms fits the arguments is asked of Triton once for each kind of call.

Triton binds and inspects every argument at every launch, which takes longer than many kernels of small maps run. Here
a call of a known kind (same numbers, types and alignments) goes straight to the compiled kernel.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from glocal.kernels.capability import version

_ABLE = version(triton.__version__) == (3, 6)  # how compiled kernels are called changes between versions
_MOST = 8192
_HERE = nullcontext()
_RUN = JITFunction.run
# Compiled kernels, and what they are given behind the arguments of a call, by (the number of) the kernel, kept alive
# here, device, constants and arguments.
_KNOWN: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch on the current device."""
    first = arguments[0][0] if type(arguments[0]) is tuple else arguments[0]
    usual = type(kernel).run is _RUN and not knobs.runtime.launch_enter_hook.calls
    facts = _facts(arguments) if _ABLE and usual and type(first) is Tensor and first.is_cuda else None
    if facts is None:
        kernel[grid](*arguments, **constants)
        return
    active: Any = driver.active
    device = active.get_current_device()
    key = (id(kernel), device, facts, *constants, *constants.values())
    known = _KNOWN.get(key)
    if known is None:
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        compiled = kernel[grid](*arguments, **constants)
        _KNOWN[key] = compiled, _behind(kernel, len(arguments), constants), kernel
        return
    compiled, behind, _ = known
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *behind
    )  # fmt: skip


def on_device(t: Tensor) -> Any:
    """The device of a tensor as the current one."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(t.device)


def _facts(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that decides which compiled form fits; None where an argument is of another kind."""
    found: list[Any] = []
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            found.append(value.dtype)
            found.append(value.data_ptr() % 16 == 0)
        elif kind is int or value is None:
            found.append(value)
        elif kind is float:  # any number
            found.append(float)
        elif kind is tuple:
            inner = _facts(value)
            if inner is None:
                return None
            found.append(inner)
        else:
            return None
    return tuple(found)


def _behind(kernel: Any, given: int, constants: dict[str, Any]) -> tuple[Any, ...]:
    """Values of the parameters behind the `given` ones."""
    return tuple(constants.get(p.name, p.default) for p in kernel.params[given:])
