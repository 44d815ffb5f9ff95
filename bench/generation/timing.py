"""Clocks that stand inside a model, and the dense kernels that sparse methods are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from generation.models import Kind, draw
from glocal.adapt import Method, Site
from glocal.adapt.records import Core, SiteCall
from glocal.canvas import Canvas
from glocal.kernels import registry
from glocal.ops import attention
from glocal.patterns import Blocks

_SDPA = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}


LONG = 200_000  # tokens from which a dense forward takes long


class Marks:
    """Pairs of moments: events of the GPU, or seconds of the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.pairs: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """This moment."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> list[float]:
        """Seconds of each pair since the last reading."""
        pairs, self.pairs = self.pairs, []
        return [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in pairs]


def media(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Self and joint attention."""
    return tuple(s for s in sites if s.kind != "cross")


class Clock(Method):
    """Time of attention calls: attached last, it stands around whatever computes them. pairs: of queries and keys that
    the calls are given.
    """

    def __init__(self, device: torch.device) -> None:
        self.marks, self.pairs = Marks(device), 0

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return media(sites)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        begin = self.marks.now()
        out = inner(q, k, v, call)
        self.marks.pairs.append((begin, self.marks.now()))
        self.pairs += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return out


class Dense(Method):
    """Dense attention by one kernel; hidden words of a single sample are cut off."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return media(sites)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        words = call.layout.lengths.get("text")
        if words is not None and q.shape[0] == 1:
            valid = call.layout.nk - call.layout.kv.parts[-1].tokens + int(words[0])
            out = dense(self.kernel, q[:, :, :valid], k[:, :, :valid], v[:, :, :valid])
            return pad(out, (0, 0, 0, q.shape[2] - valid))
        return dense(self.kernel, q, k, v)


def dense(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by one kernel: of torch, or of ours over a plan that keeps every block."""
    if kernel == "gluon":
        if q.shape[2] != k.shape[2]:
            raise ValueError("gluon: every block of one canvas; queries and keys must be as many.")
        canvas, every = _every(q.shape[2])
        return attention(q, k, v, every, canvas=canvas, backend=kernel)
    if kernel in registry.names():
        return attention(q, k, v, backend=kernel)
    with alone(kernel):
        return scaled_dot_product_attention(q, k, v)


def alone(kernel: str) -> AbstractContextManager[object]:
    """torch's attention by one kernel of its own, wherever it is called."""
    return sdpa_kernel(_SDPA[kernel]) if kernel in _SDPA else nullcontext()


@lru_cache(maxsize=16)
def _every(tokens: int) -> tuple[Canvas, Blocks]:
    groups = -(-tokens // 128)
    return Canvas((tokens,)), Blocks(torch.ones(groups, groups, dtype=torch.bool), 128, 128)


def dense_times(kind: Kind, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of one call of every dense kernel for the shape, the fastest first; nan for one that refuses it or is
    not here, which is said.

    Longer sequences than `LONG` are compared at 131,072 tokens.
    UNets, which attend often and to little, are left to torch's own kernels.
    """
    if device.type != "cuda":
        return {"sdpa": 0.0}
    own = ("fa4_dense", "gluon") if kind.stacks else ()
    tokens = tokens if tokens < LONG else 1 << 17
    q, k, v = (draw((1, kind.heads, tokens, kind.dim), device, dtype) for _ in "qkv")
    found: dict[str, float] = {}
    for kernel in ("sdpa cudnn", "sdpa flash", *own):
        try:
            dense(kernel, q, k, v)  # compiled and warm before it is timed
            found[kernel] = min(seconds(lambda kernel=kernel: dense(kernel, q, k, v), device) for _ in "ab")
        except Exception as error:  # whatever a guest raises, the others are compared
            found[kernel] = nan
            print(f"  {kernel}: {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)
    return dict(sorted(found.items(), key=lambda item: (item[1] != item[1], item[1])))


def told(times: Mapping[str, float]) -> str:
    """Dense kernels and the milliseconds of a call, in one line."""
    return ", ".join(f"{name} {'refused' if s != s else f'{s * 1e3:.2f}'}" for name, s in times.items())


@contextmanager
def timed_blocks(model: nn.Module, stacks: tuple[str, ...], device: torch.device) -> Iterator[dict[str, Marks]]:
    """Time of every block of each stack while the context lasts."""
    marks = {name: Marks(device) for name in stacks}
    hooks = []
    for name in stacks:
        for block in model.get_submodule(name):  # type: ignore[union-attr]
            hooks += _hooked(block, marks[name])
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


def _hooked(block: nn.Module, marks: Marks) -> list[Any]:
    begun: list[Any] = []

    def after(*_: Any) -> None:
        marks.pairs.append((begun.pop(), marks.now()))

    return [block.register_forward_pre_hook(lambda *_: begun.append(marks.now())), block.register_forward_hook(after)]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall clock of one call, from an idle device to an idle device."""
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begin


def kernels(run: Callable[[], object], device: torch.device) -> list[tuple[float, Any]]:
    """Kernels of one call by name, with their microseconds (of the CPU: operators)."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        seconds(run, device)
    return [(e.self_device_time_total if cuda else e.self_cpu_time_total, e) for e in found.key_averages()]


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
