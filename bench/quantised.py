"""Quantised attention against exact kernels at one plan: error first, then time with rounding included, into a CSV.

    python3 bench/quantised.py --out results/quantised.csv [--cases "video aligned"] [--tune]

Every variant is first compared with its own definition and with exact attention on small cases; one that fails prints
no time. Tokens already lie in plan order. `relative` is the RMS error against exact attention over the RMS of it, on
sampled query blocks of the timed inputs: standard normal, or "video-like" (smooth fields, keys with a common mean).
"""

from __future__ import annotations

import argparse
import csv
import statistics
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
from glocal.ops._approximation import measured
from glocal.patterns import Neighborhood, TileWindows
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan


@dataclass(frozen=True)
class Case:
    """q [1, heads, N, dim] on a canvas."""

    pattern: Pattern
    canvas: tuple[int, ...]
    heads: int = 8
    dim: int = 128
    block: int = 128


CASES = {
    "video aligned": Case(TileWindows((6, 8, 8), 3), (30, 48, 80)),
    "image256 aligned": Case(TileWindows(16, 5), (256, 256)),
    "image128d64 aligned": Case(TileWindows(16, 3), (128, 128), 16, 64),
    "video stride 1": Case(Neighborhood((18, 24, 24)), (30, 48, 80)),
    "video aligned 64": Case(TileWindows((6, 8, 8), 3), (30, 48, 80), block=64),
}
QUANTS = {
    "int8": Quant("int8", "none", (32, 64)),
    "int8 blocks": Quant("int8", "none", (128, 128)),
    "int8 both": Quant("int8", "int8", (128, 128)),
    "int8 fp8": Quant("int8", "fp8", (128, 128)),
    "fp8": Quant("fp8", "none", (128, 128)),
    "fp8 both": Quant("fp8", "fp8", (128, 128)),
    "fp8 both, smooth": Quant("fp8", "fp8", (128, 128), smooth_k=True),
    "fp8 both, by token": Quant("fp8", "fp8", (1, 128)),
}
TUNED = (
    launch.Tuning(64, 4, 2),
    launch.Tuning(128, 8, 2),
    launch.Tuning(128, 4, 3, hopper=True),
    launch.Tuning(128, 4, 4, hopper=True),
    launch.Tuning(128, 4, 3, hopper=True, emulate=4),
)
EXACT = ("gluon", "triton", "fa4", "cudnn_sparse")


def fitted(quant: Quant, block: int) -> Quant:
    """Groups no larger than the block."""
    return replace(quant, group=(min(quant.group[0], block), min(quant.group[1], block)))


def call_of(name: str, made: BlockPlan, dim: int, quant: Quant | None = None) -> Call:
    """The call of a plan."""
    tensors = PlanTensors(**made.tensors())
    return Call(name, dim**-0.5, q_block=made.q_block, kv_block=made.kv_block, plan=tensors, quant=quant)


def check(quant: Quant, tuning: launch.Tuning, block: int) -> str:
    """Against the definition and exact attention on a small case with partial blocks and grouped heads."""
    made = plan(Neighborhood((16, 40)), Canvas((16, 128)), PlanSpec(block, block), device="cuda")
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, 2048, 128, generator=g, device="cuda").bfloat16() for h in (4, 2, 2))
    call = call_of("quantised", made, 128, fitted(quant, block))
    work = work_of(call, 2048, 2048)
    want = reference.forward(q.float(), k.float(), v.float(), Call("reference", 128**-0.5, counts=made.dense_counts()))
    same = emulate.forward(q, k, v, call, work)
    found = launch.forward(q, k, v, call, work, tuning)
    near = relative(found[0], same[0])
    far = relative(found[0], want[0])
    gap = float((found[1] - same[1]).abs().max())
    fine = near < 2e-2 and far < 0.1 and gap < 2e-2
    return f"{'ok' if fine else 'FAILED'} to definition {near:.1e}, lse {gap:.1e}, to exact {far:.1e}"


def relative(found: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS."""
    return float((found.double() - want.double()).norm() / want.double().norm())


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


def inputs(kind: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v on the GPU."""
    n = torch.Size(case.canvas).numel()
    g = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(1, case.heads, n, case.dim, generator=g, device="cuda") for _ in range(3))
    if kind == "video-like":
        shared = torch.randn(3, 1, case.heads, n // 64, case.dim, generator=g, device="cuda")
        q, k, v = (0.5 * t + 0.9 * s.repeat_interleave(64, 2) for t, s in zip((q, k, v), shared, strict=True))
        k = k + 2 * torch.randn(1, case.heads, 1, case.dim, generator=g, device="cuda")
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def in_place(made: BlockPlan) -> BlockPlan:
    """The same lists for tokens that lie in plan order, where the canvas divides into blocks."""
    if made.q_order.shape[-1] != made.layout.nq:
        return made
    order = torch.arange(made.q_order.shape[-1], dtype=torch.int32, device=made.device)[None, None]
    return replace(made, q_order=order, kv_order=order)


def exact(name: str, made: BlockPlan, qkv: tuple[Tensor, Tensor, Tensor], repeat: int) -> tuple[float, float] | str:
    """Time of an exact backend, or why there is none."""
    if name not in registry.names():
        return "no such backend"
    lacking = next(b for b in registry.backends() if b.name == name).missing("cuda")
    if lacking is not None:
        return lacking
    module, call = registry.implementation(name), call_of(name, made, qkv[0].shape[3])
    try:
        return timed(lambda: module.forward(*qkv, call), repeat)
    except Exception as error:  # a guest may raise anything; the others still run
        return f"{type(error).__name__}: {str(error)[:200]}"


def exactly(name: str, made: BlockPlan, qkv: tuple[Tensor, ...]) -> Tensor:
    """Output of an exact backend."""
    q, k, v = qkv
    return registry.implementation(name).forward(q, k, v, call_of(name, made, q.shape[3]))[0]


def roughly(call: Call, tuning: launch.Tuning, qkv: tuple[Tensor, ...]) -> Tensor:
    """Output of the quantised kernels."""
    q, k, v = qkv
    return launch.forward(q, k, v, call, work_of(call, q.shape[2], k.shape[2]), tuning)[0]


def sage(made: BlockPlan, qkv: tuple[Tensor, ...], repeat: int) -> tuple[tuple[float, float], Tensor] | str:
    """cuDNN's fp8 kernel with its own rounding, for plans of equal counts and full blocks."""
    try:
        from cudnn.block_sparse_attention import (  # pyright: ignore[reportMissingImports]
            block_sparse_attention_fp8_forward,
        )
    except ImportError as error:
        return str(error)
    counts = made.full.count
    if int(made.partial.count.sum()) or int(counts.min()) != int(counts.max()):
        return "full blocks and equal counts alone"
    heads = qkv[0].shape[1]
    index = made.full.index.expand(1, heads, -1, -1).contiguous()

    def run() -> Tensor:
        return block_sparse_attention_fp8_forward(*qkv, index, sparse_block_size=made.kv_block)["o_tensor"]

    try:
        return timed(run, repeat), run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def bench(
    case_label: str, quants: list[str], tunings: tuple[launch.Tuning, ...], sound: set[Any], repeat: int
) -> list[dict[str, Any]]:
    """Rows of one case: exact kernels, cuDNN's fp8, and every sound variant."""
    rows: list[dict[str, Any]] = []
    case = CASES[case_label]
    made = in_place(plan(case.pattern, Canvas(case.canvas), PlanSpec(case.block, case.block), device="cuda"))
    n = torch.Size(case.canvas).numel()
    work = 4.0 * n * n * case.dim * case.heads * made.kept
    qkv = inputs("normal", case)
    like = inputs("video-like", case)

    def row(name: str, time: tuple[float, float], rounding: float, errors: tuple[float, float]) -> None:
        rows.append(
            {"case": case_label, "what": name, "ms": round(time[0], 3), "least_ms": round(time[1], 3)}
            | {"rounding_ms": round(rounding, 3), "eff_tflops": round(work / time[0] / 1e9, 1)}
            | {"relative_normal": f"{errors[0]:.2e}", "relative_video_like": f"{errors[1]:.2e}"}
            | {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        )
        print(
            f"{case_label:20} {name:44} {time[0]:8.3f} ms (rounding {rounding:.3f}) {work / time[0] / 1e9:6.0f} eff. "
            f"error {errors[0]:.1e}, {errors[1]:.1e}",
            flush=True,
        )

    def errors_of(run: Callable[[tuple[Tensor, ...]], Tensor], call: Call) -> tuple[float, float]:
        first, second = (measured((x[0], x[1], x[2]), run(x), call).error for x in (qkv, like))
        return first, second

    told = replace(call_of("quantised", made, case.dim), quant=Quant(group=(1, 1)))
    for name in EXACT:
        time = exact(name, made, qkv, repeat)
        if isinstance(time, str):
            print(f"{case_label:20} {name}: {time}")
            continue
        row(name, time, 0.0, errors_of(partial(exactly, name, made), told))
    found = sage(made, qkv, repeat)
    if isinstance(found, str):
        print(f"{case_label:20} cuDNN Sage fp8: {found}")
    else:
        other = sage(made, like, 1)
        second = float("nan") if isinstance(other, str) else measured(like, other[1], told).error
        row("cuDNN Sage fp8", found[0], 0.0, (measured(qkv, found[1], told).error, second))
    for label in quants:
        for tuning in tunings:
            if (label, tuning, case.block) not in sound:
                continue
            call = call_of("quantised", made, case.dim, fitted(QUANTS[label], case.block))
            ready = work_of(call, n, n)
            time = timed(partial(roughly, call, tuning, qkv), repeat)
            rounding, _ = timed(partial(launch.quantise, *qkv, ready), repeat)
            errors = errors_of(partial(roughly, call, tuning), call)
            kind = (
                f"warp groups, emulate {tuning.emulate}"
                if tuning.hopper
                else f"{tuning.rows} rows, {tuning.warps} warps"
            )
            shown = f"{label}: {kind}, {tuning.stages} stages"
            row(shown, time, rounding, errors)
    return rows


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--quants", default=";".join(QUANTS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="time every tuning, not the default alone")
    options = parser.parse_args()
    tunings = TUNED if options.tune else (launch.DEFAULT, launch.HOPPER)
    rows: list[dict[str, Any]] = []
    sound = set()
    for label in options.quants.split(";"):
        for tuning in tunings:
            for block in sorted({CASES[case].block for case in options.cases.split(",")}):
                try:
                    found = check(QUANTS[label], tuning, block)
                except Exception as error:
                    found = f"FAILED {type(error).__name__}: {str(error)[-300:]}"
                if found.startswith("ok"):
                    sound.add((label, tuning, block))
                print(f"check {label:20} {block:4} {tuning} {found}", flush=True)
    for case_label in options.cases.split(","):
        rows += bench(case_label, options.quants.split(";"), tunings, sound, options.repeat)
    if rows:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
