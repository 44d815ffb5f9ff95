"""The CPU backend against dense attention, paired, after a correctness check, into results/cpu_backend.csv.

python bench/cpu_backend.py               # all cases and the table of docs/kernels.md; minutes
python bench/cpu_backend.py --page        # only the table, from the file
python bench/cpu_backend.py --rounds 5 --out /dev/stdout

Dense is torch's scaled_dot_product_attention, the fastest dense kernel of torch on a CPU. Both run interleaved in one
process; ratios are dense time / sparse time, median over rounds with its 90 % interval.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from glocal._files import write_atomic
from glocal.canvas import Canvas, Layout
from glocal.cli.env import environment
from glocal.measure import compare_paired
from glocal.ops import attention
from glocal.patterns import Neighborhood
from glocal.plan.build import PlanSpec, plan

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "cpu_backend.csv"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- begin: results/cpu_backend.csv -->", "<!-- end: results/cpu_backend.csv -->"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One shape. blocks: of the plan."""

    canvas: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    blocks: tuple[int, int]
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    backward: bool = False


FLAT, VIDEO = (64, 64), (16, 16, 16)
CASES = (
    Case(FLAT, (32, 32), (8, 16), (128, 128)),
    Case(FLAT, (32, 32), (1, 1), (128, 128)),
    Case(FLAT, (32, 32), (1, 1), (64, 64)),
    Case(FLAT, (32, 32), (1, 1), (256, 128)),
    Case(FLAT, (16, 16), (1, 1), (64, 64)),
    Case(FLAT, (16, 16), (1, 1), (128, 128)),
    Case(FLAT, (48, 48), (1, 1), (128, 128)),
    Case(FLAT, (61, 61), (1, 1), (128, 128)),
    Case(FLAT, (32, 32), (8, 16), (128, 128), heads=4, kv_heads=4, head_dim=32),
    Case(FLAT, (32, 32), (8, 16), (128, 128), kv_heads=2),
    Case(FLAT, (32, 32), (8, 16), (128, 128), dtype=torch.bfloat16),
    Case(FLAT, (32, 32), (8, 16), (128, 128), backward=True),
    Case(FLAT, (32, 32), (1, 1), (128, 128), backward=True),
    Case(VIDEO, (8, 12, 12), (1, 1, 1), (128, 128)),
    Case(VIDEO, (8, 12, 12), (1, 1, 1), (64, 64)),
)


def measure(case: Case, rounds: int) -> dict[str, object]:
    """One row. Raises RuntimeError if the backend is off by more than the tolerance of its precision."""
    generator = torch.Generator().manual_seed(0)
    canvas = Canvas(case.canvas)
    pattern = Neighborhood(case.window, case.stride)
    made = plan(pattern, canvas, PlanSpec(*case.blocks))
    heads = (case.heads, case.kv_heads, case.kv_heads)
    q, k, v = (torch.randn(1, h, canvas.size, case.head_dim, generator=generator).to(case.dtype) for h in heads)
    error = _check(q, k, v, pattern, canvas)
    along = torch.randn(q.shape, generator=generator).to(case.dtype)

    def sparse() -> Tensor:
        return attention(q, k, v, made, backend="cpu")

    def dense() -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=case.heads != case.kv_heads)

    def training(run: Callable[[], Tensor]) -> Callable[[], object]:
        inputs = [t.requires_grad_() for t in (q, k, v)]
        return lambda: torch.autograd.grad(run(), inputs, along)

    calls = {"dense": dense, "sparse": sparse}
    if case.backward:
        calls = {name: training(run) for name, run in calls.items()}
    timed = compare_paired(calls, rounds, "cpu", generator)
    ratio = timed.ratios["sparse"]
    here = environment()
    return {
        "canvas": "x".join(map(str, case.canvas)),
        "tokens": canvas.size,
        "window": "x".join(map(str, case.window)),
        "stride": "x".join(map(str, case.stride)),
        "blocks": "x".join(map(str, case.blocks)),
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": "forward+backward" if case.backward else "forward",
        "kept": f"{made.kept:.4f}",
        "visited": f"{made.visited:.4f}",
        "error": f"{error:.2e}",
        "dense_ms": f"{timed.times['dense'].median * 1e3:.2f}",
        "sparse_ms": f"{timed.times['sparse'].median * 1e3:.2f}",
        "speedup": f"{ratio.median:.3f}",
        "speedup_low": f"{ratio.low:.3f}",
        "speedup_high": f"{ratio.high:.3f}",
        "level": f"{ratio.level:.2f}",
        "rounds": rounds,
        "bound_by_visited": f"{1 / made.visited:.3f}",
        "bound_by_flops": f"{1 / made.kept:.3f}",
        "cpu": here.cpu,
        "features": here.cpu_features,
        "threads": here.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: Neighborhood, canvas: Canvas) -> float:
    """Largest error against masked dense attention of the same inputs in float64, one head at a time."""
    mask = pattern.mask(Layout.of(canvas))[0]
    found = attention(q, k, v, pattern, canvas=canvas, backend="cpu")
    worst = 0.0
    for head in range(q.shape[1]):
        source = head * k.shape[1] // q.shape[1]
        want = scaled_dot_product_attention(
            q[:, head].double(), k[:, source].double(), v[:, source].double(), attn_mask=mask
        )
        worst = max(worst, float((found[:, head].double() - want).abs().max() / want.abs().max()))
    limit = TOLERANCE[q.dtype]
    if not worst <= limit:
        raise RuntimeError(f"backend 'cpu' is off by {worst:.2e} of the largest value ({q.dtype}); limit {limit:g}")
    return worst


def main() -> int:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds a case")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: one for each core")
    parser.add_argument("--out", type=Path, default=CSV, help="where the table goes")
    parser.add_argument("--page", action="store_true", help="only rewrite the table of docs/kernels.md")
    options = parser.parse_args()
    if options.page:
        write_page()
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = []
    for number, case in enumerate(CASES, 1):
        rows.append(measure(case, options.rounds))
        last = rows[-1]
        print(
            f"{number}/{len(CASES)} {last['canvas']} window {last['window']} stride {last['stride']} blocks "
            f"{last['blocks']} {last['dtype']} {last['direction']}: visited {last['visited']}, speed-up "
            f"{last['speedup']} [{last['speedup_low']}, {last['speedup_high']}]",
            file=sys.stderr,
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(options.out, text.getvalue())
    if options.out == CSV:
        write_page()
    return 0


def write_page() -> None:
    """Put the rows of the file between the marks of the page."""
    with CSV.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    one = rows[0]
    names = ["canvas", "window", "stride", "blocks", "heads", "kv_heads", "head_dim", "dtype", "direction"]
    numbers = ["kept", "visited", "dense_ms", "sparse_ms", "speedup", "speedup_low", "speedup_high", "bound_by_visited"]
    lines = [
        f"{one['cpu']} ({one['features']}), {one['threads']} thread(s), torch {one['torch']}; {one['tokens']} tokens, "
        f"{one['rounds']} rounds a row; `speedup` over torch's dense attention, interval at {float(one['level']):.0%}.",
        "",
        "| " + " | ".join(f"`{name}`" for name in names + numbers) + " |",
        "|" + "---|" * len(names) + "--:|" * len(numbers),
        *("| " + " | ".join(row[name] for name in names + numbers) + " |" for row in rows),
    ]
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    write_atomic(PAGE, head + "\n".join([BEGIN, *lines, END]) + tail)


if __name__ == "__main__":
    raise SystemExit(main())
