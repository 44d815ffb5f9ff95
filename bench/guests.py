"""Guests on block lists and dense: a correctness check on small cases and sampled rows, then times, into a CSV.

    python3 bench/guests.py --out FILE.csv [--cases video,image256] [--check-only]

Tokens already lie in plan order, as in a model that is permuted once; where tiles do not divide the canvas, gathering
is timed too. Every backend is first compared with the definition, forward and backward, on small cases that use tails,
orders, grouped heads and partial blocks; one that fails is named and prints no time. "eff." counts visible pairs alone.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.kernels import reference, registry
from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.capability import refusals
from glocal.patterns import Neighborhood, PerHead, TileWindows
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan

NAMES = ("fa4", "cudnn_sparse", "gluon")


@dataclass(frozen=True)
class Case:
    """q [1, heads, N, dim] on a canvas."""

    pattern: Pattern | None
    canvas: tuple[int, ...]
    heads: int
    dim: int
    block: int = 128


CASES = {
    "video aligned": Case(TileWindows((6, 8, 8), 3), (30, 48, 80), 8, 128),
    "image256 aligned": Case(TileWindows(16, 5), (256, 256), 8, 128),
    "image128d64 aligned": Case(TileWindows(16, 3), (128, 128), 16, 64),
    "video aligned 64": Case(TileWindows((6, 8, 8), 3), (30, 48, 80), 8, 128, 64),
    "video stride 1": Case(Neighborhood((18, 24, 24)), (30, 48, 80), 8, 128),
    "image256 stride 1": Case(Neighborhood(80), (256, 256), 8, 128),
    "image256 dense": Case(None, (256, 256), 8, 128),
    "image128d64 dense": Case(None, (128, 128), 16, 64),
}


@dataclass(frozen=True)
class Small:
    """A case for the definition."""

    pattern: Pattern | None
    canvas: tuple[int, ...]
    heads: tuple[int, int] = (4, 4)
    dim: int = 128
    block: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16


SMALL = {
    "tail": Small(Neighborhood(301), (700,)),
    "whole": Small(TileWindows(128, 3), (1024,)),
    "own order": Small(Neighborhood((13, 21)), (30, 41), batch=2),
    "head 64": Small(Neighborhood(301), (700,), dim=64, dtype=torch.float16),
    "grouped": Small(Neighborhood(301), (900,), heads=(6, 2)),
    "by head": Small(PerHead((Neighborhood(201), Neighborhood(401))), (900,), heads=(4, 2)),
    "block 64": Small(Neighborhood(301), (900,), block=64),
    "dense": Small(None, (777,), heads=(4, 2)),
}


def call_of(name: str, made: BlockPlan | None, dim: int) -> Call:
    """The call of a plan without extras."""
    if made is None:
        return Call(name, dim**-0.5)
    tensors = PlanTensors(**made.tensors())
    return Call(name, dim**-0.5, q_block=made.q_block, kv_block=made.kv_block, plan=tensors)


def refused(name: str, heads: tuple[int, int], case: Any, dtype: torch.dtype, grad: bool) -> str | None:
    """Why the record refuses the case."""
    capability = next(b.capability for b in registry.backends() if b.name == name)
    n = torch.Size(case.canvas).numel()
    request = registry.Request(
        "cuda", dtype, 1, *heads, n, n, case.dim, case.dim, grad=grad, sparse=case.pattern is not None
    )
    words = refusals(capability, request, (case.block, case.block) if case.pattern is not None else None)
    return "; ".join(words) if words else None


def check(name: str, small: Small) -> str:
    """Largest errors of out, LSE and gradients over the largest value, or the refusal."""
    words = refused(name, small.heads, small, small.dtype, False)
    if words is not None:
        return f"refused: {words}"
    made = None
    if small.pattern is not None:
        made = plan(small.pattern, Canvas(small.canvas), PlanSpec(small.block, small.block), device="cuda")
    g = torch.Generator("cuda").manual_seed(0)
    n = torch.Size(small.canvas).numel()
    q, k, v, grad = (
        torch.randn(small.batch, h, n, small.dim, generator=g, device="cuda").to(small.dtype)
        for h in (small.heads[0], small.heads[1], small.heads[1], small.heads[0])
    )
    counts = torch.ones(1, 1, n, n, dtype=torch.int32, device="cuda") if made is None else made.dense_counts()
    exact = Call("reference", small.dim**-0.5, counts=counts)
    wide = (q.float(), k.float(), v.float())
    want = reference.forward(*wide, exact)
    module, call = registry.implementation(name), call_of(name, made, small.dim)
    out, lse = module.forward(q, k, v, call)
    errors = {"out": gap(out, want[0]), "lse": gap(lse, want[1])}
    if refused(name, small.heads, small, small.dtype, True) is None:
        grad_lse = torch.randn(lse.shape, generator=g, device="cuda")
        if name == "cudnn_sparse":
            grad_lse = torch.zeros_like(grad_lse)
        right = reference.backward(grad.float(), grad_lse, *wide, *want, exact)
        found = module.backward(grad, grad_lse, q, k, v, out, lse, call)
        errors |= {f"d{s}": gap(getattr(found, s), getattr(right, s)) for s in "qkv"}
    bad = [key for key, error in errors.items() if not error < 2e-2]
    shown = " ".join(f"{key} {error:.1e}" for key, error in errors.items())
    return ("FAILED " if bad else "ok ") + shown


def gap(found: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found.double() - want.double()).abs().max() / want.abs().max())


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


def in_place(made: BlockPlan) -> BlockPlan:
    """The same lists for tokens that lie in plan order, where the canvas divides into blocks."""
    if made.q_order.shape[-1] != made.layout.nq:
        return made
    order = torch.arange(made.q_order.shape[-1], dtype=torch.int32, device=made.device)[None, None]
    return replace(made, q_order=order, kv_order=order)


def sampled(made: BlockPlan, qkv: tuple[Tensor, ...], out: Tensor) -> float:
    """Error of the rows of four query blocks whose key blocks are all full; NaN where there are none."""
    q, k, v = qkv
    worst = float("nan")
    if made.q_order.shape[-1] != made.layout.nq:
        return worst
    rows = (made.partial.count[0] == 0).nonzero().flatten().tolist()
    for row in rows[:: max(1, len(rows) // 4)]:
        head = row % q.shape[1]
        listed = made.full.index[0, row, : int(made.full.count[0, row])].long()
        size, at = made.kv_block, slice(row * made.q_block, (row + 1) * made.q_block)
        keys = (listed[:, None] * size + torch.arange(size, device=q.device)).flatten()
        s = q[0, head, at].float() @ k[0, head, keys].float().mT * q.shape[3] ** -0.5
        error = gap(out[0, head, at], s.softmax(-1) @ v[0, head, keys].float())
        worst = error if worst != worst else max(worst, error)
    return worst


def bench(name: str, label: str, case: Case, repeat: int) -> list[dict[str, Any]]:
    """Rows forward and backward of one backend."""
    heads = (case.heads, case.heads)
    made = None
    if case.pattern is not None:
        made = in_place(plan(case.pattern, Canvas(case.canvas), PlanSpec(case.block, case.block), device="cuda"))
    n = torch.Size(case.canvas).numel()
    q, k, v, grad = (torch.randn(1, case.heads, n, case.dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    work = 4.0 * n * n * case.dim * case.heads * (1.0 if made is None else made.kept)
    module, call = registry.implementation(name), call_of(name, made, case.dim)
    out, lse = module.forward(q, k, v, call)
    error = float("nan") if made is None else sampled(made, (q, k, v), out)
    rows = []
    zero = torch.zeros_like(lse)
    for kind, factor, run in (
        ("forward", 1.0, lambda: module.forward(q, k, v, call)),
        ("backward", 2.5, lambda: module.backward(grad, zero, q, k, v, out, lse, call)),
    ):
        if refused(name, heads, case, torch.bfloat16, kind == "backward") is not None:
            continue
        median, least = timed(run, repeat)
        eff = work * factor / median / 1e9
        rows.append(
            {"case": label, "backend": name, "pass": kind, "ms": round(median, 3), "least_ms": round(least, 3)}
            | {"eff_tflops": round(eff, 1), "error": f"{error:.1e}", "device": torch.cuda.get_device_name()}
        )
        print(f"{label:22} {name:13} {kind:9} {median:8.3f} ms  {eff:6.0f} eff.  error {error:.1e}", flush=True)
    return rows


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--names", default=",".join(NAMES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--small", default=",".join(SMALL))
    options = parser.parse_args()
    rows, bad = [], set()
    for name in [*options.names.split(","), "fa4_dense"]:
        backend = next(b for b in registry.backends() if b.name == name)
        lacking = backend.missing("cuda")
        if lacking is not None:
            print(f"{name}: {lacking}")
            bad.add(name)
            continue
        for label, small in SMALL.items():
            if label not in options.small.split(","):
                continue
            if (small.pattern is None) == (name != "fa4_dense"):
                continue
            start = time.time()
            try:
                found = check(name, small)
            except Exception as error:  # a guest may raise anything; the others still run
                found = f"FAILED {type(error).__name__}: {str(error)[:300]}"
            if found.startswith("FAILED"):
                bad.add(name)
            print(f"check {name:13} {label:24} {found}  ({time.time() - start:.1f} s)", flush=True)
    for label in [] if options.check_only else options.cases.split(","):
        case = CASES[label]
        for name in ("fa4_dense",) if case.pattern is None else options.names.split(","):
            if name in bad or refused(name, (case.heads, case.heads), case, torch.bfloat16, False) is not None:
                continue
            try:
                rows += bench(name, label, case, options.repeat)
            except Exception as error:
                print(f"{label} {name}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
    if rows:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
