"""How long planning takes on the device: from a map of picked blocks, or a top-k, to lists. Writes results rows.

python bench/planning.py -o FILE

Checks each against the plain torch twin first. `graph_us` is a replay of a CUDA graph, what a captured step pays;
`eager_us` is a call from Python, launches included.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glocal._files import write_atomic
from glocal.canvas import Canvas, Layout
from glocal.ops import attention
from glocal.plan import plan_blocks, plan_selection
from glocal.plan.lists import compact, compact_columns, plain_rising, rising
from glocal.routing import Partition, Selection


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


def cases(blocks: int, heads: int) -> dict[str, Callable[[], Any]]:
    """What is timed, for maps [1, heads, blocks, blocks] at a tenth of all blocks."""
    g = torch.Generator("cuda").manual_seed(0)
    scores = torch.rand(1, heads, blocks, blocks, generator=g, device="cuda")
    picked = scores > 0.9
    top = scores.topk(blocks // 10, dim=-1).indices.int()
    count = torch.full(top.shape[:3], top.shape[3], dtype=torch.int32, device="cuda")
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
        "plan from a top-k": lambda: plan_selection(Selection(layout, part, part, top, count), device="cuda"),
    }


def no_waits() -> None:
    """A call with a dynamic plan, forward and backward, never waits for the device, and a graph can hold it."""
    layout, part = Layout.of(Canvas((2048,))), Partition.blocks(2048, 128)
    q, k, v = (torch.randn(1, 4, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    scores = torch.rand(1, 4, 16, 16, device="cuda")

    def step() -> torch.Tensor:
        made = plan_blocks(scores > 0.5, layout, part, part, backward=True)
        out = attention(q, k, v, made, backend="triton")
        grads = torch.autograd.grad(out, (q, k, v), out.detach())
        return torch.cat([out.detach().flatten(), *(g.flatten() for g in grads)])

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        scores.copy_(torch.rand_like(scores))
        graph.replay()
        assert torch.equal(found, step()), "a replay differs from a call"


def main() -> int:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    no_waits()
    print("no waits, and a graph holds plan, forward and backward")
    rows = []
    for blocks, heads in ((900, 1), (900, 8), (1000, 8), (2048, 8)):
        for name, fn in cases(blocks, heads).items():
            fast, spread = graph_us(fn)
            eager, eager_spread = timed(fn, 30, 1)
            rows.append((name, blocks, heads, fast, spread, eager, eager_spread))
            print(
                f"{name:32s} {blocks:5d} blocks {heads} heads: graph {fast:7.1f} us, eager {eager:7.1f} us", flush=True
            )
    text = io.StringIO()
    writer = csv.writer(text)
    device, versions = torch.cuda.get_device_name(), f"torch {torch.__version__}"
    writer.writerow(("what", "blocks", "heads", "graph_us", "graph_iqr", "eager_us", "eager_iqr", "device", "versions"))
    for name, blocks, heads, *numbers in rows:
        writer.writerow((name, blocks, heads, *(f"{n:.2f}" for n in numbers), device, versions))
    write_atomic(given.out, text.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
