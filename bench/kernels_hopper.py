"""Check, then time, block-sparse forward kernels on the shapes of record: aligned windows, stride 1, 64-token blocks.

    python3 bench/kernels_hopper.py --out FILE.csv [--names "video;image256 stride"] [--repeat 5]

Every variant is first compared with float32 on sampled query blocks; one that fails prints no time.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.kernels.call import Call, PlanTensors
from glocal.patterns import Neighborhood, StridedShards, TileWindows
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


TOLERANCE = 2e-2  # largest error of out over its largest value, and of LSE

CASES = {
    "video aligned": Case(TileWindows((6, 8, 8), 3), (30, 48, 80), 8, 128),
    "image256 aligned": Case(TileWindows(16, 5), (256, 256), 8, 128),
    "image128d64 aligned": Case(TileWindows(16, 3), (128, 128), 16, 64),
    "video stride 1": Case(Neighborhood((18, 24, 24)), (30, 48, 80), 8, 128),
    "image256 stride 1": Case(Neighborhood(80), (256, 256), 8, 128),
    "image128d64 stride 1": Case(Neighborhood(48), (128, 128), 16, 64),
    "video aligned 64": Case(TileWindows((6, 8, 8), 3), (30, 48, 80), 8, 128, 64),
    "image256 aligned 64": Case(TileWindows(16, 5), (256, 256), 8, 128, 64),
    "s2 131072, local 16, stride 16": Case(StridedShards(64, 16, 16, heads_q=8), (131_072,), 8, 128, 64),
    "s2 131072, local 4, stride 64": Case(StridedShards(64, 4, 64, heads_q=8), (131_072,), 8, 128, 64),
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


@dataclass(frozen=True)
class Row:
    """One line of the table; tflops count visible pairs, visited_tflops those of all visited blocks."""

    case: str
    part: str
    variant: str
    ms: float
    least_ms: float
    visible_tflops: float
    visited_tflops: float
    error: float
    repeats: int
    device: str
    torch: str
    triton: str


class Bench:
    """All variants of one case: checked, then timed."""

    def __init__(self, name: str, case: Case, repeat: int) -> None:
        self.name, self.case, self.repeat = name, case, repeat
        self.plan = made(case, "cuda")
        g = torch.Generator("cuda").manual_seed(1)
        shape = (1, case.heads, self.plan.layout.nq, case.dim)
        q, k, v = (torch.randn(shape, device="cuda", generator=g).bfloat16() for _ in range(3))
        self.qkv = (q, k, v)
        self.call = call_of(self.plan, case.dim)

    def row(self, part: str, variant: str, times: tuple[float, float], error: float) -> Row:
        """With rates."""
        import triton

        case, p = self.case, self.plan
        visible, visited = p.flops(case.heads, case.dim), 4.0 * p.visited_pairs * case.heads * case.dim
        rates = (visible / times[0] / 1e9, visited / times[0] / 1e9)
        versions = torch.cuda.get_device_name(), torch.__version__, triton.__version__
        return Row(self.name, part, variant, *times, *rates, error, self.repeat, *versions)

    def rows(self, variant: str) -> list[Row]:
        """The kernel alone; for the shipped tuning ("") also what is copied into plan order, and the whole call."""
        from glocal.kernels.gluon import launch
        from glocal.kernels.gluon.tuning import tuning

        q, k, v = self.qkv
        changes = {name: int(value) for name, value in (word.split("=") for word in variant.split())}
        work = launch.work_of(q, k, v, self.call)
        tuned = replace(tuning((work.call.q_block, work.call.kv_block), self.case.dim), **changes)
        out, lse = launch.forward(q, k, v, self.call, tuned)
        error = checked(self.plan, self.qkv, out, lse)
        if not error < TOLERANCE:
            raise ValueError(f"error {error:.3g} is not below {TOLERANCE}")
        given = launch.placed(work, q, k, v, tuned)
        found = [
            self.row("kernel", variant, timed(partial(launch.run, work, given, out, lse, tuned), self.repeat), error)
        ]
        if not variant:
            for part, run in (
                ("into plan order", partial(launch.placed, work, q, k, v)),
                ("whole call", partial(launch.forward, q, k, v, self.call)),
            ):
                found.append(self.row(part, variant, timed(run, self.repeat), error))
        return found


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", default="", help="how names of cases begin, parted by ;")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--variants", default="", help="changes to the tuning, as in 'stages=3 persistent=0,held=1'")
    asked = parser.parse_args()
    wrong = 0
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        for name, case in CASES.items():
            if not name.startswith(tuple(asked.names.split(";"))):
                continue
            bench = Bench(name, case, asked.repeat)
            print(f"{name}: {bench.plan}", flush=True)
            for variant in asked.variants.split(","):
                try:
                    found = bench.rows(variant)
                except Exception as problem:  # a variant that does not fit is a line that says so, and an exit code
                    print(f"  {variant}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
                    wrong += 1
                    continue
                for r in found:
                    writer.writerow([f"{x:.4g}" if isinstance(x, float) else x for x in astuple(r)])
                    print(
                        f"  {r.part} {r.variant}: {r.ms:.3f} ms (least {r.least_ms:.3f}), visible "
                        f"{r.visible_tflops:.0f}, visited {r.visited_tflops:.0f} TFLOP/s, error {r.error:.2g}",
                        flush=True,
                    )
                file.flush()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
