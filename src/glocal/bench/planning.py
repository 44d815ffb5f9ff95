"""`glocal bench planning`: from a map of picked blocks, or a top-k, to lists on the device.

Each is checked against its plain torch twin first, and a whole step - plan, forward, backward - is shown to wait for
nothing and to fit into a CUDA graph. `graph_us` is a replay, what a captured step pays; `eager_us` is a call from
Python, launches included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch

from glocal.bench.suites import Options
from glocal.canvas import Canvas, Layout
from glocal.ops import attention
from glocal.plan import plan_blocks, plan_selection
from glocal.plan.lists import compact, compact_columns, plain_rising, rising
from glocal.routing import Partition, Selection

WORDS = "planning: block lists made on the device"
COLUMNS = ("what", "blocks", "heads", "graph_us", "graph_iqr", "eager_us", "eager_iqr", "device", "versions")
SIZES = ((900, 1), (900, 8), (1000, 8), (2048, 8))


def run(options: Options) -> list[tuple[Any, ...]]:
    """All rows. Raises ValueError without a CUDA device, AssertionError where a check fails."""
    if not options.device.startswith("cuda"):
        raise ValueError(f"device={options.device!r}: planning is timed on CUDA; nearest: cuda")
    no_waits(options.device)
    device, versions = torch.cuda.get_device_name(options.device), f"torch {torch.__version__}"
    rows = [
        (what, blocks, heads, *(f"{n:.2f}" for n in numbers), device, versions)
        for what, blocks, heads, *numbers in measured(SIZES, options.device)
    ]
    options.emit(rows)
    return rows


def wrong(records: list[dict[str, Any]]) -> list[str]:
    """Nothing: a failed check raises."""
    return []


def measured(sizes: Iterable[tuple[int, int]], device: str) -> list[tuple[Any, ...]]:
    """(what, blocks, heads, graph_us, spread, eager_us, spread) of every case."""
    return [
        (name, blocks, heads, *graph_us(fn), *timed(fn, 30, 1))
        for blocks, heads in sizes
        for name, fn in cases(blocks, heads, device).items()
    ]


def graph_us(fn: Callable[[], Any], rounds: int = 30) -> tuple[float, float]:
    """Median and spread of a replay, in microseconds; 20 copies of the call in one graph."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            fn()
    return timed(graph.replay, rounds, 20)


def timed(fn: Callable[[], Any], rounds: int, copies: int) -> tuple[float, float]:
    """Median and distance of the quartiles of fn() / copies, in microseconds."""
    times = []
    fn()
    for _ in range(rounds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        fn()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / copies)
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.median(times), high - low


def cases(blocks: int, heads: int, device: str) -> dict[str, Callable[[], Any]]:
    """What is timed, for maps [1, heads, blocks, blocks] at a tenth of all blocks."""
    g = torch.Generator(device).manual_seed(0)
    scores = torch.rand(1, heads, blocks, blocks, generator=g, device=device)
    picked = scores > 0.9
    top = scores.topk(blocks // 10, dim=-1).indices.int()
    count = torch.full(top.shape[:3], top.shape[3], dtype=torch.int32, device=device)
    layout, part = Layout.of(Canvas((blocks * 128,))), Partition.blocks(blocks * 128, 128)
    for a, b in zip(compact(picked[0], blocks), compact(picked[0].cpu(), blocks), strict=True):
        assert torch.equal(a.cpu(), b)
    for a, b in zip(compact_columns(picked[0]), compact_columns(picked[0].cpu()), strict=True):
        assert torch.equal(a.cpu(), b)
    for a, b in zip(rising(top[0], count[0], blocks), plain_rising(top[0], count[0], blocks), strict=True):
        assert torch.equal(a, b)
    return {
        "lists from a map": lambda: compact(picked[0], blocks),
        "lists by key block from a map": lambda: compact_columns(picked[0]),
        "a top-k in order": lambda: rising(top[0], count[0], blocks),
        "plan from a map": lambda: plan_blocks(picked, layout, part, part),
        "plan from a map, for backward": lambda: plan_blocks(picked, layout, part, part, backward=True),
        "plan from a threshold on scores": lambda: plan_blocks(scores > 0.9, layout, part, part),
        "plan from a top-k": lambda: plan_selection(Selection(layout, part, part, top, count), device=device),
    }


def no_waits(device: str) -> None:
    """A call with a dynamic plan, forward and backward, never waits for the device, and a graph can hold it."""
    layout, part = Layout.of(Canvas((2048,))), Partition.blocks(2048, 128)
    q, k, v = (torch.randn(1, 4, 2048, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    scores = torch.rand(1, 4, 16, 16, device=device)

    def step() -> torch.Tensor:
        made = plan_blocks(scores > 0.5, layout, part, part, backward=True)
        out = attention(q, k, v, made, backend="triton")
        grads = torch.autograd.grad(out, (q, k, v), out.detach())
        return torch.cat([out.detach().flatten(), *(g.flatten() for g in grads)])

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        scores.copy_(torch.rand_like(scores))
        graph.replay()
        assert torch.equal(found, step()), "a replay differs from a call"
