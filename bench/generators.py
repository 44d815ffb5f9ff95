"""Sparse methods in real video and image models: attention and a denoising step against the best dense kernel, into
results/generators.csv.

python bench/generators.py                                     # all cases on the GPU
python bench/generators.py --case "wan2.1-14b 81" --rounds 2   # one of them; rows of the others stay in the table
python bench/generators.py --case flux --profile gna           # where the time of a forward goes, by kernel
python bench/generators.py --tiny --device cpu --out /dev/stdout

Architectures, sizes and dtype are the papers', weights are random: time does not depend on them, except that a router
keeps more blocks of random queries than of trained ones; `kept` is what it kept here (of HiDiffusion: pairs that its
smaller maps and windows have, as a share of the pairs of the dense step). Every method first passes a
check: at a small size the output of the model equals that by the definition (backend "reference", dense kernels of
another make); one that does not is reported, gets no row, and the exit code is 1. Then dense and sparse forwards run in
turn in one process; the dense ones use the fastest dense kernel that is here, and so does what a method leaves dense.
dense_ms_a_call names all dense kernels that were compared at the shape, and those that refused or are not installed.

A card does not hold the whole models, and their blocks are alike, so a few are built at full width. Measured are: one
attention call with all that the method does for it (attention_ms: routing, permutation, kernel, rectification), one
block of each stack (block_ms) and the forward without its blocks (rest_ms). step_s is the step of the whole model put
together from them: rest + number of blocks x block, no block dense. run_s is not measured: seconds of a whole run that
follow from dense and sparse steps and from the first steps and layers that the paper leaves dense (without text encoder
and decoder); run_forecast is the ratio to a dense run. The columns of flash2 are against steps and runs with
FlashAttention-2 as torch brings it, which most of the papers compare with. HiDiffusion's steps are of several kinds, a
row each; its run_s is of all. UNets wait for the host: kernels_ms is the sum of the kernels of a step,
kernels_speedup and kernels_forecast are ratios of it; what a step computes is counted by hidiffusion_flops.py. "fused
norms": queries and keys normed and rotated in one pass, beside dense with that.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from generation.cases import CASES
from generation.measure import Options, measure
from generation.rows import merged, rows_of, write

CSV = Path(__file__).resolve().parent.parent / "results" / "generators.csv"
SHOWN = (
    "case", "method", "kept", "kernel", "attention_ms", "block_ms", "rest_ms",
    "attention_speedup", "step_speedup", "step_speedup_flash2", "run_forecast", "run_forecast_flash2", "error",
)  # fmt: skip


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="only cases whose name contains this, in this order")
    parser.add_argument("--method", default="", help="only methods whose name contains this")
    parser.add_argument("--without", action="append", default=[], help="no methods whose name contains this")
    parser.add_argument(
        "--patience", type=float, help="end, and say where it stands, if a check or forward takes longer"
    )
    parser.add_argument("--layers", type=int, help="blocks of each stack to build")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--seconds", type=float, help="begin no further case after so many")
    parser.add_argument("--case-seconds", type=float, default=3600.0, help="no further round of a case after so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="compile the kernels of the cases and measure nothing")
    parser.add_argument("--profile", help="print the kernels of one forward of methods whose name contains this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small grids and few heads, to see that it runs")
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    device = torch.device(args.device)
    chosen = ("bfloat16" if device.type == "cuda" else "float32") if args.dtype is None else args.dtype
    dtype = getattr(torch, chosen)
    options = Options(device, dtype, args.rounds, args.warm, args.case_seconds, args.patience)
    begin, failed = time.perf_counter(), 0
    for case in dict.fromkeys(
        c for word in ([""] if args.case is None else args.case) for c in CASES if word in c.name
    ):
        if args.seconds is not None and time.perf_counter() - begin > args.seconds:
            print(f"{case.name}: left out, {args.seconds:.0f} s are over", file=sys.stderr)
            continue
        entries = (e for e in case.entries if args.method in e.name)
        case = replace(case, entries=tuple(e for e in entries if not any(part in e.name for part in args.without)))
        if args.layers is not None:
            case = replace(case, built=tuple(min(args.layers, n) for n in case.kind.whole))
        measured = None
        try:
            for measured in measure(case.tiny() if args.tiny else case, options):
                mine = rows_of(measured)  # a run that is cut keeps the rounds it had
                write(merged(args.out, mine, ("case", "method")), args.out)
        except Exception as problem:  # the other cases are measured
            failed += 1
            print(f"{case.name}: {type(problem).__name__}: {str(problem)[:400]}", file=sys.stderr, flush=True)
        if measured is not None:
            failed += len(measured.wrong)
            print(f"{case.name}: {time.perf_counter() - begin:.0f} s since the start", flush=True)
            for row in rows_of(measured):
                print({name: row[name] for name in SHOWN}, flush=True)
            for text in () if args.profile is None else measured.profiles(args.profile):
                print(text, flush=True)
        del measured
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
