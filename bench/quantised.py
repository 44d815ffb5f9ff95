"""Quantised attention against exact kernels at one plan: error first, then time with rounding included, into a CSV.

    python3 bench/quantised.py --out results/quantised.csv [--case "video aligned"] [--only "int8 fp8,fp8 both"]

Each variant first runs in a process of its own, all side by side, where its kernels are compiled and compared with
their definition and with exact attention; one that fails, or is not ready by `--ready` seconds, prints no time. Then
all are timed in turn. Tokens lie in plan order. Errors are RMS over RMS of exact attention in float32 on sampled query
blocks of the timed inputs: standard normal, or "video-like" (groups of like tokens, keys with a common mean).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.kernels import reference, registry
from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.quant import Quant
from glocal.kernels.quantised import emulate, launch
from glocal.kernels.quantised.work import work_of
from glocal.patterns import Neighborhood, TileWindows
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan

START = time.time()
DEVICE = "cuda"
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """q [1, heads, N, dim] on a canvas whose tiles divide into blocks: every visited block is full."""

    pattern: Pattern
    canvas: tuple[int, ...]
    heads: int = 8
    dim: int = 128
    block: int = 128


CASES = {
    "video aligned": Case(TileWindows((6, 8, 8), 3), (30, 48, 80)),
    "image256 aligned": Case(TileWindows(16, 5), (256, 256)),
    "image128d64 aligned": Case(TileWindows(16, 3), (128, 128), 16, 64),
}
QUANTS = {
    "int8 fp8": Quant("int8", "fp8", (128, 128)),
    "int8 fp8, smooth": Quant("int8", "fp8", (128, 128), smooth_k=True),
    "int8": Quant("int8", "none", (128, 128)),
    "fp8 both": Quant("fp8", "fp8", (128, 128)),
    "int8 both": Quant("int8", "int8", (128, 128)),
    "int8 as PAROAttention": Quant("int8", "none", (32, 64)),
}
TRITON, HOPPER = launch.Tuning(), launch.HOPPER
VARIANTS = {
    "int8 fp8, warp groups": ("int8 fp8", HOPPER),
    "fp8 both, warp groups": ("fp8 both", HOPPER),
    "int8, warp groups": ("int8", HOPPER),
    "int8 fp8, warp groups, emulate 4": ("int8 fp8", replace(HOPPER, emulate=4)),
    "fp8 both, warp groups, emulate 4": ("fp8 both", replace(HOPPER, emulate=4)),
    "int8 fp8, smooth, warp groups": ("int8 fp8, smooth", HOPPER),
    "int8 fp8, triton": ("int8 fp8", TRITON),
    "int8 as PAROAttention, triton": ("int8 as PAROAttention", TRITON),
    "int8 both, triton": ("int8 both", TRITON),
}
EXACT = ("gluon", "fa4")
SAGE = "cuDNN Sage fp8"


def call_of(name: str, made: BlockPlan, dim: int, quant: Quant | None = None) -> Call:
    """The call of a plan."""
    tensors = PlanTensors(**made.tensors())
    return Call(name, dim**-0.5, q_block=made.q_block, kv_block=made.kv_block, plan=tensors, quant=quant)


def check(quant: Quant, tuning: launch.Tuning, block: int) -> str:
    """Against the definition and exact attention on a small case with full and partial blocks and grouped heads."""
    made = plan(Neighborhood((16, 40)), Canvas((16, 128)), PlanSpec(block, block), device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(1, h, 2048, 128, generator=g, device=DEVICE).bfloat16() for h in (4, 2, 2))
    call = call_of("quantised", made, 128, quant)
    work = work_of(call, 2048, 2048)
    want = reference.forward(q.float(), k.float(), v.float(), Call("reference", 128**-0.5, counts=made.dense_counts()))
    same = emulate.forward(q, k, v, call, work)
    found = launch.forward(q, k, v, call, work, tuning)
    near, far = relative(found[0], same[0]), relative(found[0], want[0])
    gap = float((found[1] - same[1]).abs().max())
    fine = near < 2e-2 and far < 0.1 and gap < 2e-2
    return f"{'ok' if fine else 'FAILED'} to definition {near:.1e}, lse {gap:.1e}, to exact {far:.1e}"


def relative(found: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS."""
    return float((found.double() - want.double()).norm() / want.double().norm())


def inputs(kind: str, case: Case) -> Inputs:
    """q, k, v on the device."""
    n = torch.Size(case.canvas).numel()
    g = torch.Generator(DEVICE).manual_seed(1)
    q, k, v = (torch.randn(1, case.heads, n, case.dim, generator=g, device=DEVICE) for _ in range(3))
    if kind == "video-like":
        shared = torch.randn(3, 1, case.heads, n // 64, case.dim, generator=g, device=DEVICE)
        q, k, v = (0.5 * t + 0.9 * s.repeat_interleave(64, 2) for t, s in zip((q, k, v), shared, strict=True))
        k = k + 2 * torch.randn(1, case.heads, 1, case.dim, generator=g, device=DEVICE)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def planned(case: Case) -> BlockPlan:
    """The lists for tokens that lie in plan order."""
    made = plan(case.pattern, Canvas(case.canvas), PlanSpec(case.block, case.block), device=DEVICE)
    order = torch.arange(made.layout.nq, dtype=torch.int32, device=DEVICE)[None, None]
    if made.q_order.shape[-1] != made.layout.nq or int(made.partial.count.sum()):
        raise ValueError(f"{made} has pads or partial blocks; legal: tiles that divide the canvas.")
    return replace(made, q_order=order, kv_order=order)


def sample(made: BlockPlan, qkv: Inputs) -> tuple[Tensor, Tensor]:
    """Tokens of four query blocks, and exact attention for them [heads, tokens, D], float32."""
    tokens, wants = [], []
    for row in range(0, made.q_blocks, max(1, made.q_blocks // 4)):
        mine = torch.arange(row * made.q_block, (row + 1) * made.q_block, device=DEVICE)
        listed = made.full.index[0, row, : int(made.full.count[0, row])].long()
        keys = (listed[:, None] * made.kv_block + torch.arange(made.kv_block, device=DEVICE)).flatten()
        q, k, v = qkv[0][0, :, mine].float(), qkv[1][0, :, keys].float(), qkv[2][0, :, keys].float()
        tokens.append(mine)
        wants.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)
    return torch.cat(tokens), torch.cat(wants, 1)


def timed(run: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Median and smallest time in milliseconds."""
    for _ in range(2):
        run()
    found = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found), min(found)


def runner(name: str, made: BlockPlan, case: Case) -> Callable[[Inputs], Tensor]:
    """The output of an exact backend, of cuDNN's fp8 kernel, or of a variant."""
    if name in VARIANTS:
        label, tuning = VARIANTS[name]
        call = call_of("quantised", made, case.dim, QUANTS[label])
        work = work_of(call, made.layout.nq, made.layout.nk)
        return lambda x: launch.forward(*x, call, work, tuning)[0]
    if name == SAGE:
        from cudnn.block_sparse_attention import (  # pyright: ignore[reportMissingImports]
            block_sparse_attention_fp8_forward,
        )

        index = made.full.index.expand(1, case.heads, -1, -1).contiguous()
        return lambda x: block_sparse_attention_fp8_forward(*x, index, sparse_block_size=made.kv_block)["o_tensor"]
    lacking = next(b for b in registry.backends() if b.name == name).missing(DEVICE)
    if lacking is not None:
        raise ValueError(lacking)
    module, call = registry.implementation(name), call_of(name, made, case.dim)
    return lambda x: module.forward(*x, call)[0]


def warm(name: str, case: Case) -> str:
    """Compile what a row needs; for a variant, what its check found."""
    found = "ok"
    if name in VARIANTS:
        label, tuning = VARIANTS[name]
        found = check(QUANTS[label], tuning, case.block)
    runner(name, planned(case), case)(inputs("normal", case))
    torch.cuda.synchronize()
    return found


def measured(name: str, case: Case, made: BlockPlan, given: dict[str, Any], repeat: int) -> dict[str, Any]:
    """One row."""
    run = runner(name, made, case)
    errors = {}
    for kind, (qkv, (tokens, want)) in given.items():
        errors[kind] = relative(run(qkv)[0, :, tokens], want)
    qkv = given["normal"][0]
    median, least = timed(partial(run, qkv), repeat)
    rounding = 0.0
    if name in VARIANTS:
        call = call_of("quantised", made, case.dim, QUANTS[VARIANTS[name][0]])
        rounding, _ = timed(partial(launch.quantise, *qkv, work_of(call, made.layout.nq, made.layout.nk)), repeat)
    n = torch.Size(case.canvas).numel()
    eff = 4.0 * n * n * case.dim * case.heads * made.kept / median / 1e9
    return {
        "what": name,
        "ms": round(median, 3),
        "least_ms": round(least, 3),
        "rounding_ms": round(rounding, 3),
        "eff_tflops": round(eff, 1),
        **{f"relative_{kind}": f"{error:.2e}" for kind, error in errors.items()},
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", default="video aligned", choices=list(CASES))
    parser.add_argument("--only", default=";".join([*EXACT, SAGE, *VARIANTS]), help="names, parted by ;")
    parser.add_argument("--ready", type=float, default=600, help="seconds after which nothing is waited for")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warm", default="", help="compile and check one name, in this process")
    options = parser.parse_args()
    case = CASES[options.case]
    if options.warm:
        print(f"{options.warm}: {warm(options.warm, case)} ({time.time() - START:.0f} s)", flush=True)
        return
    names = options.only.split(";")
    command = [sys.executable, __file__, "--case", options.case, "--warm"]
    waiting = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in names
    }
    made = planned(case)
    given = {}
    for kind in ("normal", "video-like"):
        qkv = inputs(kind, case)
        given[kind.replace("-", "_")] = (qkv, sample(made, qkv))
    ready = []
    for name, process in waiting.items():
        try:
            text, _ = process.communicate(timeout=max(0.1, options.ready - (time.time() - START)))
        except subprocess.TimeoutExpired:
            process.kill()
            text = f"{name}: not ready in time"
        told = next((line for line in text.splitlines() if line.startswith(f"{name}: ")), text[-300:])
        print(told, flush=True)
        if told.startswith(f"{name}: ok"):
            ready.append(name)
    with options.out.open("w", newline="") as file:
        writer = None
        for name in ready:
            row = {"case": options.case, **measured(name, case, made, given, options.repeat)}
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(" ".join(str(value) for value in row.values()), f"({time.time() - START:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
