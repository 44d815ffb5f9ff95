"""Error of quantised attention against exact attention, by its definition on the CPU, into results/quantised_error.csv.

    python bench/quantised_error.py [--out FILE.csv]

The error is RMS over RMS over all rows, exact attention in float64. Inputs of head size 128 on 8 x 24 x 32 tokens:
"normal", or "video-like": groups of 64 like tokens in plan order and keys with a common mean. No speed is measured.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.ops import Quant, Score, attention
from glocal.patterns import TileWindows
from glocal.plan.build import PlanSpec, plan

OUT = Path(__file__).resolve().parent.parent / "results" / "quantised_error.csv"
CANVAS, PATTERN = Canvas((8, 24, 32)), TileWindows((2, 8, 8), 3)
QUANTS = (
    Quant("int8", "none", (32, 64)),
    Quant("int8", "none", (128, 128)),
    Quant("int8", "none", (128, 128), smooth_k=True),
    Quant("int8", "fp8", (128, 128)),
    Quant("int8", "int8", (64, 64)),
    Quant("fp8", "none", (128, 128)),
    Quant("fp8", "fp8", (128, 128)),
    Quant("fp8", "fp8", (1, 128)),
    Quant("int4", "none", (32, 64)),
    Quant("int4", "none", (32, 64), smooth_k=True),
)


def inputs(kind: str, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 2, N, 128] in bfloat16; `slots` says where each token lies in the plan."""
    g = torch.Generator().manual_seed(1)
    n = CANVAS.size
    q, k, v = (torch.randn(1, 2, n, 128, generator=g) for _ in range(3))
    if kind == "video-like":
        shared = torch.randn(3, 1, 2, n // 64, 128, generator=g).repeat_interleave(64, 3)[:, :, :, slots]
        q, k, v = (0.5 * t + 0.9 * s for t, s in zip((q, k, v), shared, strict=True))
        k = k + 2 * torch.randn(1, 2, 1, 128, generator=g)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    made = plan(PATTERN, CANVAS, PlanSpec(128, 128))
    slots = made.q_order[0, 0].long().argsort()
    rows = []
    for kind in ("normal", "video-like"):
        q, k, v = inputs(kind, slots)
        want = attention(q.double(), k.double(), v.double(), PATTERN, canvas=CANVAS)
        for quant in (None, *QUANTS):
            found = attention(q, k, v, made, score=Score(quant=quant)).double()
            error = float((found - want).norm() / want.norm())
            worst = float((found - want).abs().max() / want.abs().max())
            what = "bfloat16, not quantised" if quant is None else str(quant)
            rows.append(
                {"inputs": kind, "what": what, "relative_rms": f"{error:.2e}", "relative_worst": f"{worst:.2e}"}
            )
            print(*rows[-1].values(), flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
