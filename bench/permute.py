"""Reordering q, k and v in one pass against a plain copy of the same bytes, into results/permute.csv. Needs CUDA.

python bench/permute.py
python bench/permute.py --tune --out /dev/null    # tile sizes and warps side by side

The order is the tile order of a canvas. Every row was first compared with the definition in float32. Calls are CUDA
graphs, timed interleaved in one process; ratios are copy time / time, median over rounds with its 90 % interval. The
rate counts the tensors read and written once, as for the copy: tables and orders are not counted.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from glocal._files import write_atomic
from glocal.canvas import Canvas
from glocal.canvas.orders import tile
from glocal.kernels import permute as definition
from glocal.kernels.permute import Finish
from glocal.kernels.triton import permute
from glocal.measure import compare_paired

CSV = Path(__file__).resolve().parent.parent / "results" / "permute.csv"
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Case:
    """One canvas, its tile, heads and head size."""

    name: str
    canvas: tuple[int, ...]
    tile: tuple[int, ...]
    heads: int
    size: int


CASES = (
    Case("video", (30, 48, 80), (6, 8, 8), 8, 128),
    Case("image256", (256, 256), (16, 16), 8, 128),
    Case("image128d64", (128, 128), (16, 16), 16, 64),
)


def graph(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph: what the device does, without the time of the host."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        run()
    return made.replay


def variants(case: Case) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What is timed, after the comparison with the definition; and the errors."""
    g = torch.Generator("cuda").manual_seed(0)
    n, h, d = prod(case.canvas), case.heads, case.size
    packed = torch.randn(1, n, 3, h, d, generator=g, device="cuda").bfloat16()
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]  # [1, H, N, D]
    whole = [t.contiguous() for t in views]
    order = tile(Canvas(case.canvas), case.tile).gather.int().cuda()[None, None]
    angle = torch.rand(n, d // 2, generator=g, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    head, every = (torch.rand(size, generator=g, device="cuda") for size in (d, h * d))
    steps = {
        "norm of a head, rotation side by side": Finish(head, 1e-6, cos, sin),
        "norm of a head, rotation apart": Finish(head, 1e-6, cos, sin, interleaved=False),
        "norm over heads, rotation side by side": Finish(every, 1e-6, cos, sin),
    }
    asked: dict[str, tuple[list[Tensor], list[Finish | None]]] = {
        "[B, H, N, D]": (whole, []),
        "packed qkv": (views, []),
    }
    asked |= {f"packed qkv, {name}": (views, [step, step, None]) for name, step in steps.items()}
    errors, calls = {}, {}
    for name, (tensors, finish) in asked.items():
        found = permute.gather_rows(tensors, order, finish)
        want = definition.gather_rows([t.float() for t in tensors], order, finish)
        errors[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, want, strict=True))
        if not errors[name] <= (TOLERANCE if finish else 0):
            raise RuntimeError(f"{case.name}, {name}: off by {errors[name]:.2e} of the largest value")
        calls[name] = lambda tensors=tensors, finish=finish: permute.gather_rows(tensors, order, finish)
    back = permute.gather_rows(whole, order)
    into = torch.empty_like(packed)
    targets = [into[:, :, i].transpose(1, 2) for i in range(3)]

    def scatter() -> None:
        for t, out in zip(back, targets, strict=True):
            permute.scatter_rows(t, order, n, out)

    scatter()
    if not torch.equal(into, packed):
        raise RuntimeError(f"{case.name}: there and back is not the same")
    errors["back into packed qkv"], calls["back into packed qkv"] = 0.0, scatter
    room = torch.empty_like(packed)
    index = order[0, 0].long()
    usual = {"copy": lambda: room.copy_(packed), "indexing": lambda: [t[:, :, index] for t in whole]}
    return usual | calls, errors


def measure(case: Case, rounds: int) -> list[dict[str, object]]:
    """The rows of one case."""
    calls, errors = variants(case)
    timed = compare_paired(
        {name: graph(run) for name, run in calls.items()}, rounds, "cuda", torch.Generator(), warmup=3
    )
    bytes_ = 2 * 3 * prod(case.canvas) * case.heads * case.size * 2
    rows = []
    for name, time in timed.times.items():
        ratio = timed.ratios.get(name)
        rows.append(
            {
                "case": case.name,
                "tokens": prod(case.canvas),
                "heads": case.heads,
                "head_dim": case.size,
                "dtype": "bfloat16",
                "call": name,
                "error": f"{errors[name]:.2e}" if name in errors else "",
                "ms": f"{time.median * 1e3:.4f}",
                "ms_low": f"{time.low * 1e3:.4f}",
                "ms_high": f"{time.high * 1e3:.4f}",
                "TB_per_s": f"{bytes_ / time.median / 1e12:.2f}",
                "of_copy": "" if ratio is None else f"{ratio.median:.3f}",
                "of_copy_low": "" if ratio is None else f"{ratio.low:.3f}",
                "of_copy_high": "" if ratio is None else f"{ratio.high:.3f}",
                "rounds": rounds,
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
            }
        )
        print(f"{case.name:12} {name:55} {rows[-1]['ms']} ms {rows[-1]['TB_per_s']} TB/s {rows[-1]['of_copy']}")
    return rows


def tune(case: Case, rounds: int) -> None:
    """Tile sizes and warps, printed."""
    usual = permute._TILES
    for entries in (2048, 4096, 8192, 16384):
        for warps in (4, 8):
            permute._TILES = dict.fromkeys(usual, (entries, warps))
            calls, _ = variants(case)
            timed = compare_paired({k: graph(run) for k, run in calls.items()}, rounds, "cuda", warmup=2)
            text = "  ".join(f"{ratio.median:.3f}" for name, ratio in timed.ratios.items() if name != "indexing")
            print(f"{case.name:12} entries {entries:6} warps {warps}: {text}", flush=True)
    permute._TILES = usual


def main() -> int:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="interleaved rounds a case")
    parser.add_argument("--out", type=Path, default=CSV, help="where the table goes")
    parser.add_argument("--tune", action="store_true", help="print tile sizes and warps side by side first")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.tune:
            tune(case, 7)
        rows += measure(case, options.rounds)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(options.out, text.getvalue())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
