"""Check, then time, block-sparse forward kernels on the shapes of record: aligned windows, stride 1, 64-token blocks.

    python3 bench/kernels_hopper.py --out FILE.csv [--cases video,image256] [--repeat 5]

Every variant is first compared with float32 on sampled query blocks; one that fails prints no time.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.kernels.call import Call, PlanTensors
from glocal.patterns import Neighborhood, TileWindows
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan, unpack
from glocal.plan.build import PlanSpec, plan


@dataclass(frozen=True)
class Case:
    """pattern on canvas; q [1, heads, N, dim]."""

    pattern: Pattern
    canvas: tuple[int, ...]
    heads: int
    dim: int
    block: int = 128


CASES = {
    "video aligned": Case(TileWindows((6, 8, 8), 3), (30, 48, 80), 8, 128),
    "image256 aligned": Case(TileWindows(16, 5), (256, 256), 8, 128),
    "image128d64 aligned": Case(TileWindows(16, 3), (128, 128), 16, 64),
    "video stride 1": Case(Neighborhood((18, 24, 24)), (30, 48, 80), 8, 128),
    "image256 stride 1": Case(Neighborhood(80), (256, 256), 8, 128),
    "image128d64 stride 1": Case(Neighborhood(48), (128, 128), 16, 64),
    "video aligned 64": Case(TileWindows((6, 8, 8), 3), (30, 48, 80), 8, 128, 64),
    "image256 aligned 64": Case(TileWindows(16, 5), (256, 256), 8, 128, 64),
    "image128d64 aligned 64": Case(TileWindows(16, 3), (128, 128), 16, 64, 64),
}


def made(case: Case, device: str) -> BlockPlan:
    """The plan."""
    return plan(case.pattern, Canvas(case.canvas), PlanSpec(case.block, case.block), device=device)


def call_of(p: BlockPlan, dim: int) -> Call:
    """The call of a plan without extras."""
    return Call("gluon", dim**-0.5, q_block=p.q_block, kv_block=p.kv_block, plan=PlanTensors(**p.tensors()))


def checked(p: BlockPlan, qkv: tuple[Tensor, ...], out: Tensor, lse: Tensor, samples: int = 6) -> float:
    """Largest error of out over largest value, and of LSE, on query blocks spread over the plan; float32."""
    worst = 0.0
    q, k, v = qkv
    group = q.shape[1] // k.shape[1]
    for number in range(samples):
        block = (number * (p.q_blocks - 1)) // max(1, samples - 1)
        head = number % q.shape[1]
        u = int(p.owner[0, head % p.owner.shape[1]])
        mine = p.q_order[0, 0, block * p.q_block : (block + 1) * p.q_block].long()
        keep = mine >= 0
        keys, seen = [], []
        for lists, full in ((p.full, True), (p.partial, False)):
            for i in range(int(lists.count[u, block])):
                at = int(lists.index[u, block, i])
                keys.append(p.kv_order[0, 0, at * p.kv_block : (at + 1) * p.kv_block].long())
                mask = torch.ones(p.q_block, p.kv_block, dtype=torch.bool, device=q.device)
                if not full:
                    assert lists.mask is not None
                    row = int(lists.mask[u, block, i])
                    mask = unpack(p.masks[row : row + 1], p.kv_block)[0]
                seen.append(mask)
        tokens, mask = torch.cat(keys), torch.cat(seen, 1)[keep]
        s = q[0, head, mine[keep]].float() @ k[0, head // group, tokens].float().mT * q.shape[3] ** -0.5
        s = s.masked_fill(~mask, -torch.inf)
        want = s.softmax(-1) @ v[0, head // group, tokens].float()
        gap = (out[0, head, mine[keep]].float() - want).abs().max() / want.abs().max()
        other = (lse[0, head, mine[keep]] - s.logsumexp(-1)).abs().max()
        worst = max(worst, float(gap), float(other))
        if not (float(gap) == float(gap) and float(other) == float(other)):
            return float("nan")
    return worst


def timed(run: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Median and smallest time in milliseconds."""
    for _ in range(2):
        run()
    found = []
    for _ in range(repeat):
        torch.cuda._sleep(1 << 20)  # the host runs ahead meanwhile
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found), min(found)


def main() -> None:
    """See the top of the file."""
    from glocal.kernels.gluon import launch
    from glocal.kernels.gluon.tuning import tuning

    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--skip", default="")
    parser.add_argument("--variants", default="")
    asked = parser.parse_args()
    rows = []
    for name, case in CASES.items():
        wanted = not asked.cases or any(word in name for word in asked.cases.split(","))
        if not wanted or name in asked.skip.split(","):
            continue
        start = time.time()
        p = made(case, "cuda")
        n = p.layout.nq
        print(f"{name}: {p} planned in {time.time() - start:.1f} s", flush=True)
        g = torch.Generator("cuda").manual_seed(1)
        shape = (1, case.heads, n, case.dim)
        q, k, v = qkv = tuple(
            torch.randn(shape, device="cuda", generator=g, dtype=torch.float32).bfloat16() for _ in range(3)
        )
        call = call_of(p, case.dim)
        work = launch.prepare(q, k, v, call)
        given = launch.placed(work, q, k, v)
        print(f"  into plan order {timed(partial(launch.placed, work, q, k, v), asked.repeat)[0]:.3f} ms", flush=True)
        for variant in asked.variants.split(","):
            changes = {name: int(value) for name, value in (word.split("=") for word in variant.split() if word)}
            tuned = replace(tuning(case.block, case.dim), **changes)
            try:
                out, lse = launch.forward(q, k, v, call, tuned)
                error = checked(p, qkv, out, lse)
                if not error < 2e-2:
                    print(f"  {variant}: WRONG, error {error}", flush=True)
                    continue
                kernel = timed(partial(launch.run, work, given, out, lse, tuned), asked.repeat)
            except Exception as problem:  # a variant that does not fit is a row that says so
                print(f"  {variant}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
                continue
            visible = p.flops(case.heads, case.dim) / kernel[0] / 1e9
            visited = 4.0 * p.visited_pairs * case.heads * case.dim / kernel[0] / 1e9
            print(
                f"  {variant}: {kernel[0]:.3f} ms (least {kernel[1]:.3f}) visible {visible:.0f} visited {visited:.0f} "
                f"TFLOP/s, error {error:.2g}",
                flush=True,
            )
            rows.append(
                [name, variant, f"{kernel[0]:.4f}", f"{kernel[1]:.4f}", f"{visible:.1f}", f"{visited:.1f}", error]
            )
        whole = timed(partial(launch.forward, q, k, v, call), asked.repeat)
        print(f"  whole call with permutation {whole[0]:.3f} ms", flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "variant", "ms", "least_ms", "visible_tflops", "visited_tflops", "error"])
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
