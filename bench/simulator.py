"""Our simulator beside the published figures of NATTENSim (GNA, arXiv 2504.16922), into results/ and docs/.

python bench/simulator.py            # writes results/simulator.csv and the table of docs/simulate.md; seconds, no GPU
python bench/simulator.py --check    # writes nothing; exit code 1 if either is out of date
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from glocal._files import write_atomic
from glocal.patterns.axis import AxisWindow
from glocal.plan.checks import size_text
from glocal.plan.simulate import simulate

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "simulator.csv"
PAGE = ROOT / "docs" / "simulate.md"
BEGIN, END = "<!-- begin: results/simulator.csv -->", "<!-- end: results/simulator.csv -->"


@dataclass(frozen=True)
class Point:
    """One stride: end-to-end speed-up the paper simulated, and measured on a B200."""

    stride: tuple[int, ...]
    simulated: float
    measured: float


@dataclass(frozen=True)
class Case:
    """One model and window of the paper. share: self-attention in its time. bound: end to end, by FLOPs alone."""

    model: str
    canvas: tuple[int, ...]
    window: tuple[int, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    share: float
    bound: float
    points: tuple[Point, ...]


# fmt: off
CASES = (
    Case("HunyuanVideo 91%", (30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8), share=0.607, bound=2.23, points=(
        Point((1, 1, 1), simulated=1.73, measured=1.73),
        Point((2, 1, 1), simulated=1.78, measured=1.77),
        Point((1, 1, 8), simulated=1.99, measured=1.95),
        Point((2, 1, 8), simulated=2.02, measured=1.98),
        Point((1, 8, 8), simulated=2.17, measured=2.09),
        Point((2, 8, 8), simulated=2.2, measured=2.11),
        Point((16, 8, 8), simulated=2.23, measured=2.23),
        Point((18, 24, 24), simulated=2.06, measured=2.0),
    )),
    Case("HunyuanVideo 58%", (30, 48, 80), (30, 40, 40), (4, 8, 8), (2, 8, 8), share=0.607, bound=1.55, points=(
        Point((1, 1, 1), simulated=1.21, measured=1.15),
        Point((1, 1, 8), simulated=1.44, measured=1.26),
        Point((1, 32, 8), simulated=1.55, measured=1.53),
    )),
    Case("FLUX.1-dev 4K 90%", (256, 256), (80, 80), (16, 16), (16, 8), share=0.518, bound=1.88, points=(
        Point((1, 1), simulated=1.76, measured=1.65),
        Point((16, 1), simulated=1.84, measured=1.72),
        Point((16, 16), simulated=1.88, measured=1.82),
    )),
    Case("Cosmos-7B 89%", (16, 44, 80), (16, 24, 16), (8, 4, 8), (4, 4, 8), share=0.587, bound=2.1, points=(
        Point((1, 1, 1), simulated=1.9, measured=1.76),
        Point((1, 8, 1), simulated=1.96, measured=1.79),
        Point((1, 1, 16), simulated=2.05, measured=1.88),
        Point((1, 8, 16), simulated=2.1, measured=2.05),
    )),
    Case("Cosmos-7B 56%", (16, 44, 80), (16, 32, 48), (8, 4, 8), (4, 4, 8), share=0.587, bound=1.5, points=(
        Point((1, 1, 1), simulated=1.35, measured=1.18),
        Point((1, 8, 1), simulated=1.42, measured=1.2),
        Point((1, 1, 16), simulated=1.42, measured=1.21),
        Point((1, 8, 16), simulated=1.5, measured=1.46),
    )),)
# fmt: on


def rows() -> list[dict[str, str | int | float]]:
    """One row a published point, ours beside theirs."""
    table: list[dict[str, str | int | float]] = []
    for case in CASES:
        for point in case.points:
            rules = [AxisWindow(k, s) for k, s in zip(case.window, point.stride, strict=True)]
            ours = simulate(case.canvas, rules, case.q_tile, case.kv_tile)
            whole = ours.end_to_end(case.share)
            table.append(
                {
                    "model": case.model,
                    "canvas": size_text(case.canvas),
                    "window": size_text(case.window),
                    "stride": size_text(point.stride),
                    "q_tile": size_text(case.q_tile),
                    "kv_tile": size_text(case.kv_tile),
                    "share": case.share,
                    "op_speedup": round(ours.op_speedup, 4),
                    "mean_speedup": round(ours.mean_speedup, 4),
                    "effective_speedup": round(ours.effective_speedup, 4),
                    "flop_bound": round(ours.flop_bound, 4),
                    "perfectly_block_sparse": "yes" if ours.perfectly_block_sparse else "no",
                    "end_to_end": round(whole, 3),
                    "end_to_end_paper": point.simulated,
                    "difference": round(round(whole, 3) - point.simulated, 3),
                    "end_to_end_paper_b200": point.measured,
                    "end_to_end_bound": round(ours.end_to_end(case.share, ours.flop_bound), 3),
                    "end_to_end_bound_paper": case.bound,
                }
            )
    return table


def as_csv(table: list[dict[str, str | int | float]]) -> str:
    """The rows as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def as_markdown(text: str) -> str:
    """The CSV as the page shows it."""
    head = ("model, sparsity", "stride", "op speed-up", "bound", "perfect", "end to end", "paper", "paper, B200")
    lines = [head, ("---",) * len(head)]
    for row in csv.DictReader(io.StringIO(text)):
        speeds = [f"{float(row[key]):.2f}" for key in ("op_speedup", "flop_bound")]
        paper = [f"{float(row[key]):.2f}" for key in ("end_to_end_paper", "end_to_end_paper_b200")]
        ours = f"{float(row['end_to_end']):.3f}"
        lines.append((row["model"], row["stride"], *speeds, row["perfectly_block_sparse"], ours, *paper))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_with(table: str) -> str:
    """docs/simulate.md with the table between its marks renewed."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{PAGE} lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    """Write or check both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    check = parser.parse_args().check
    text = as_csv(rows())
    wanted = {CSV: text, PAGE: page_with(as_markdown(text))}
    if check:
        stale = [path for path, content in wanted.items() if not path.exists() or path.read_text("utf-8") != content]
        for path in stale:
            print(f"out of date: {path.relative_to(ROOT)}; run python bench/simulator.py", file=sys.stderr)
        return 1 if stale else 0
    for path, content in wanted.items():
        write_atomic(path, content)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
