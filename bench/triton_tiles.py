"""Which tiles, warps and stages serve the Triton backend best on this card: rows for results/triton_tiles.csv.

python bench/triton_tiles.py -o FILE [--case NAME ...]

Every variant is compared with the first one, and the first with exact attention on some rows, before it is timed.
Variants are compiled by several processes first, since compiling takes longer than measuring.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from glocal._files import write_atomic
from glocal.canvas import Canvas, Layout, tile
from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.triton import defaults
from glocal.kernels.triton.defaults import Tuning
from glocal.measure import time_call
from glocal.patterns import Neighborhood
from glocal.plan.build import PlanSpec, plan


@dataclass(frozen=True)
class Case:
    """A neighbourhood on a canvas."""

    canvas: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    tile: tuple[int, ...]
    heads: int
    head_dim: int


CASES = {
    "image256": Case((256, 256), (80, 80), (16, 16), (16, 8), 8, 128),
    "image256 stride 1": Case((256, 256), (80, 80), (1, 1), (16, 8), 8, 128),
    "image256 64": Case((256, 256), (80, 80), (16, 16), (8, 8), 8, 128),
    "image128d64": Case((128, 128), (48, 48), (16, 16), (16, 8), 16, 64),
    "image128d64 stride 1": Case((128, 128), (48, 48), (1, 1), (16, 8), 16, 64),
}

WIDE = {
    "forward": [(128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2),
                (128, 64, 8, 4), (128, 64, 8, 2), (128, 32, 8, 4), (64, 64, 4, 2), (64, 32, 4, 4)],
    "backward_q": [(128, 64, 8, 2), (128, 128, 8, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 1),
                   (128, 32, 8, 3), (64, 32, 4, 3), (128, 32, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2)],
    "backward_kv": [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 128, 8, 1), (64, 64, 8, 2),
                    (32, 64, 4, 3), (32, 128, 8, 3), (64, 128, 8, 3), (32, 64, 4, 2), (64, 64, 4, 3)],
}  # fmt: skip
NARROW = {
    "forward": [(128, 64, 4, 3), (128, 128, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3),
                (128, 64, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4), (128, 32, 4, 4), (64, 128, 4, 2)],
    "backward_q": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 3),
                   (128, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (128, 32, 4, 3), (64, 64, 4, 4)],
    "backward_kv": [(64, 128, 8, 2), (64, 128, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 2),
                    (64, 128, 8, 3), (32, 128, 4, 3), (64, 64, 4, 2), (128, 64, 4, 3), (32, 128, 8, 3)],
}  # fmt: skip


def variants(case: Case) -> dict[str, list[Tuning]]:
    """What is tried; tiles that the blocks cut down to another one of the list are left out."""
    block = 1
    for n in case.tile:
        block *= n
    table = WIDE if case.head_dim > 64 else NARROW
    return {part: [Tuning(*v) for v in rows if max(v[:2]) <= block] for part, rows in table.items()}


def put(part: str, value: Tuning) -> None:
    """Make `value` the choice for every head size."""
    defaults.TABLE[part] = [(256, value, value)]  # type: ignore[index]


def inputs(case: Case) -> tuple[list[Tensor], Call, Canvas]:
    """q, k, v and gradient in tile order, and the call."""
    canvas = Canvas(case.canvas)
    order = tile(canvas, case.tile)
    made = plan(
        Neighborhood(case.window, case.stride), canvas, PlanSpec(order.block, order.block, order, order), device="cuda"
    )
    g = torch.Generator("cuda").manual_seed(0)
    shape = (1, case.heads, canvas.size, case.head_dim)
    ts = [torch.randn(shape, generator=g, device="cuda", dtype=torch.float32).bfloat16() for _ in range(4)]
    call = Call("triton", case.head_dim**-0.5, None, order.block, order.block, PlanTensors(**made.tensors()))
    return ts, call, canvas


def parts(case: Case) -> tuple[dict[str, object], list[Tensor], Call, Canvas]:
    """The three kernels of a case as functions of nothing."""
    from glocal.kernels.triton import launch
    from glocal.kernels.triton.work import prepare

    (q, k, v, grad), call, canvas = inputs(case)
    out, lse = launch.forward(q, k, v, call)
    known = launch.Known(grad, torch.zeros_like(lse), out, lse)
    w = prepare(q, k, v, call)
    rows, keys, bias = launch._rows(w, q, known), w.keys(k, v, 0.0), launch.BiasGrads.of(w, q, k)
    functions: dict[str, object] = {
        "forward": lambda: launch.forward(q, k, v, call)[0],
        "backward_q": lambda: launch._grad_q(w, q, rows, keys, bias),
        "backward_kv": lambda: launch._grad_kv(w, k, v, rows, keys, bias),
    }
    return functions, [q, k, v], call, canvas


_LAST: dict[str, dict[str, object]] = {}


def compile_one(job: tuple[str, str, Tuning]) -> str:
    """Run a variant once, so that the compiled kernel lies in the cache on disk."""
    name, part, value = job
    try:
        if name not in _LAST:  # one case at a time: several processes share the memory of the card
            _LAST.clear()
            _LAST[name] = parts(CASES[name])[0]
        functions = _LAST[name]
        put(part, value)
        functions[part]()  # type: ignore[operator]
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return ""


def exact(case: Case, q: Tensor, k: Tensor, v: Tensor, canvas: Canvas, some: Tensor) -> Tensor:
    """Attention of some queries in float32, [1, H, some, D]."""
    layout = Layout.of(canvas)
    at = layout.q_coords(some).unsqueeze(1), layout.kv_coords(torch.arange(canvas.size, device="cuda")).unsqueeze(0)
    seen = Neighborhood(case.window, case.stride).allows(*at, layout)
    s = q[:, :, some].float() @ k.float().transpose(-1, -2) * case.head_dim**-0.5
    return s.masked_fill(~seen, -torch.inf).softmax(-1) @ v.float()


def main() -> int:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--workers", type=int, default=12)
    given = parser.parse_args()
    names = list(CASES) if given.case is None else given.case
    jobs = [(n, part, v) for n in names for part, values in variants(CASES[n]).items() for v in values]
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        failed = {job: text for job, text in zip(jobs, pool.map(compile_one, jobs), strict=True) if text}
    for job, text in failed.items():
        print("left out:", job, text)
    lines = []
    for name in names:
        case = CASES[name]
        functions, (q, k, v), call, canvas = parts(case)
        assert call.plan is not None
        blocks = (call.plan.full_count.sum() + call.plan.part_count.sum()).item() * call.q_block * call.kv_block
        some = torch.arange(0, canvas.size, canvas.size // 61, device="cuda")
        for part, values in variants(case).items():
            first = None
            rows = []
            for value in values:
                if (name, part, value) in failed:
                    continue
                put(part, value)
                found = functions[part]()  # type: ignore[operator]
                found = found if isinstance(found, Tensor) else torch.cat([t.flatten() for t in found])
                if first is None:
                    first = found
                    if part == "forward":
                        want = exact(case, q, k, v, canvas, some)
                        error = float((found[:, :, some].float() - want).abs().max() / want.abs().max())
                        assert error < 2e-2, (name, error)
                worst = float((found.float() - first.float()).abs().max() / first.float().abs().max())
                if not worst < 2e-2:
                    print("RED", name, part, value, worst)
                    continue
                times = time_call(functions[part], device="cuda", warmup=2, repeats=7)  # type: ignore[arg-type]
                products = {"forward": 2, "backward_q": 3, "backward_kv": 4}[part]
                rate = 2 * products * blocks * case.heads * case.head_dim / times.median / 1e12
                rows.append((times.median * 1e3, rate, value))
            rows.sort(key=lambda row: row[0])
            for ms, rate, value in rows[:4]:
                print(f"{name:22s} {part:12s} {ms:8.3f} ms {rate:6.0f} TFLOP/s visited {value}", flush=True)
            lines += [(name, part, v.queries, v.keys, v.warps, v.stages, f"{ms:.4f}", f"{r:.1f}") for ms, r, v in rows]
            if rows:
                put(part, rows[0][2])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("case", "kernel", "queries", "keys", "warps", "stages", "ms", "visited_tflops"))
    writer.writerows(lines)
    write_atomic(given.out, text.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
