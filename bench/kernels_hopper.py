"""Launch numbers of the Hopper forward kernel side by side, for `glocal/kernels/gluon/tuning.py`.

    python bench/kernels_hopper.py --out FILE.csv [--names "video aligned;S2"] [--variants "stages=3,queries=2 held=1"]

Cases are the forward ones of `glocal bench kernels`. Every variant is first held against exact attention, as there; one
that is wrong, or does not fit, prints why and no time. Then the kernel alone is timed, all variants in turn.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from glocal.bench.kernel_cases import CASES, Case, inputs
from glocal.bench.kernels import LIMIT, largest_error
from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.gluon import launch
from glocal.kernels.gluon.tuning import tuning
from glocal.measure import compare_paired

COLUMNS = ("case", "variant", "ms", "ms_low", "ms_high", "visible_tflops", "visited_tflops", "error", "device", "torch")


def checked(case: Case, variants: list[str]) -> tuple[dict[str, Callable[[], object]], dict[str, float], float, float]:
    """The variants that are right, ready to be timed, their errors, and the shares of pairs kept and visited."""
    made = case.compiled("cuda")
    q, k, v, _ = inputs(case, "cuda")
    plan = PlanTensors(**made.tensors())
    call = Call("gluon", case.head_dim**-0.5, q_block=made.q_block, kv_block=made.kv_block, plan=plan)
    work = launch.work_of(q, k, v, call)
    usual = tuning((work.call.q_block, work.call.kv_block), case.head_dim, launch.tiles_of(work)[1])
    good: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for variant in variants:
        changes = {name: int(value) for name, value in (word.split("=") for word in variant.split())}
        tuned = replace(usual, **changes)
        try:
            out, lse = launch.forward(q, k, v, call, tuned)
            errors[variant] = largest_error(case, out, (q, k, v), made)
        except Exception as problem:  # a variant that does not fit says so, and the others still run
            print(f"  {variant}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
            continue
        if not errors[variant] <= LIMIT:
            print(f"  {variant}: off by {errors[variant]:.1e} of the largest entry; limit {LIMIT:g}", flush=True)
            continue
        good[variant] = partial(launch.run, work, launch.placed(work, q, k, v, tuned), out, lse, tuned)
    return good, errors, made.kept, made.visited


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", default="", help="how names of cases begin, parted by ;")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--variants", required=True, help="changes to the tuning, parted by commas")
    asked = parser.parse_args()
    variants = list(dict.fromkeys(["", *asked.variants.split(",")]))
    names = tuple(asked.names.split(";"))
    cases = [c for c in CASES if c.passes == "forward" and c.pattern is not None and c.name.startswith(names)]
    end = (torch.cuda.get_device_name(), torch.__version__)
    wrong = 0
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for case in cases:
            print(case.name, flush=True)
            good, errors, kept, visited = checked(case, variants)
            wrong += len(variants) - len(good)
            if len(good) < 2:  # nothing to compare
                continue
            timed = compare_paired(good, asked.repeat, "cuda", warmup=1, flush=True).times
            for variant, time in timed.items():
                rate = 4 * case.tokens**2 * case.head_dim * case.heads / time.median / 1e12
                times = [f"{t * 1e3:.4f}" for t in (time.median, time.low, time.high)]
                row = [case.name, variant, *times, f"{rate * kept:.0f}", f"{rate * visited:.0f}"]
                writer.writerow([*row, f"{errors[variant]:.1e}", *end])
                print("  " + " ".join(row[1:]), flush=True)
            file.flush()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
