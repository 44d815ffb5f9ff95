"""Rows of the table: what was measured on the blocks that were built, put together to the whole model."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path
from statistics import median

import torch

from generation.measure import FLASH, FUSED, Contender, Measured
from generation.timing import told
from glocal._files import write_atomic

Step = Callable[..., float]  # of Measured, Contender, round, dense layers: seconds of a forward


def whole_step(measured: Measured, contender: Contender, turn: int, dense_layers: tuple[int, ...] = ()) -> float:
    """Seconds of a forward of the whole model in round `turn`: all its blocks at the measured time of one, and the
    rest as measured; `dense_layers` blocks of each stack at the time of dense ones.
    """
    times, kind = contender.times, measured.case.kind
    total = times.rest[turn]
    dense = measured.contenders[FUSED if contender.fused else "dense"].times.blocks[turn]
    for i, (count, block) in enumerate(zip(kind.whole, times.blocks[turn], strict=True)):
        still = dense_layers[i] if i < len(dense_layers) else 0
        total += (count - still) * block + still * dense[i]
    return total


def kernel_step(measured: Measured, contender: Contender, turn: int, dense_layers: tuple[int, ...] = ()) -> float:
    """Seconds of the kernels of a forward of a UNet in round `turn`."""
    return contender.times.kernels[turn]


def run_seconds(measured: Measured, contender: Contender, step: Step = whole_step) -> float:
    """Seconds of a run, computed from whole steps: dense first steps and layers as published.

    nan where a part of the run was not measured.
    """
    entry, steps = contender.entry, measured.case.steps
    turns = range(len(contender.times.step))
    if entry is None:
        return steps * median(step(measured, contender, t) for t in turns)
    base = measured.contenders[FUSED if entry.fused else "dense"]
    dense = median(step(measured, base, t) for t in turns)
    run = [c for c in measured.contenders.values() if c.entry is not None and c.entry.group == entry.group]
    parts = run if entry.group else [contender]
    seconds, left = float(entry.dense_steps * dense), steps - entry.dense_steps
    for part in parts:
        assert part.entry is not None
        count = steps - entry.dense_steps if part.entry.steps is None else part.entry.steps
        left -= count
        seconds += count * median(step(measured, part, t, part.entry.dense_layers) for t in turns)
    return seconds if left == 0 else nan


def rows_of(measured: Measured) -> list[dict[str, object]]:
    """One row a method, dense attention first."""
    return [_row(measured, name, c) for name, c in measured.contenders.items() if c.times.step]


def _row(measured: Measured, name: str, contender: Contender) -> dict[str, object]:
    case, times, entry = measured.case, contender.times, contender.entry
    base = measured.contenders["dense"]
    turns = range(len(times.step))
    mine = [whole_step(measured, contender, t) for t in turns]
    ratios = sorted(whole_step(measured, base, t) / s for t, s in zip(turns, mine, strict=True))
    dense = measured.bench.kernel if contender.kernel is None else contender.kernel
    other = measured.contenders.get(FLASH)
    flash = [] if other is None else [whole_step(measured, other, t) for t in turns]
    attention = [a / b for a, b in zip(base.times.attention, times.attention, strict=True)]
    ran, kind, run = contender.ran, case.kind, run_seconds(measured, contender)
    busy, whole = median(times.kernels) if times.kernels else nan, nan
    if times.kernels:
        whole = run_seconds(measured, base, kernel_step) / run_seconds(measured, contender, kernel_step)
    return {
        "case": case.name,
        "method": name,
        "built": f"{sum(case.layers)} of {sum(kind.whole)} blocks" if kind.stacks else "whole",
        "tokens": case.tokens,
        "kept": f"{contender.pairs / base.pairs if contender.kept is None else contender.kept:.4f}",
        "visited": f"{sum(r.visited for r in ran) / len(ran):.4f}" if ran else "",
        "kernel": ",".join(sorted({k for r in ran for k in r.kernels})) if ran else dense,
        "dense_ms_a_call": told(measured.bench.dense) if contender is base else "",
        "attention_ms": _ms(median(times.attention)),
        "attention_speedup": _ratio(median(attention)),
        "block_ms": " + ".join(_ms(median(b[i] for b in times.blocks)) for i in range(len(kind.stacks))),
        "rest_ms": _ms(median(times.rest)),
        "step_s": f"{median(mine):.4f}",
        "step_speedup": _ratio(median(ratios)),
        "step_speedup_low": _ratio(ratios[0]),
        "step_speedup_high": _ratio(ratios[-1]),
        "step_speedup_flash2": _ratio(median(flash[t] / s for t, s in zip(turns, mine, strict=True)) if flash else nan),
        "dense_steps": 0 if entry is None else entry.dense_steps,
        "dense_layers": 0 if entry is None else sum(entry.dense_layers),
        "run_s": "" if run != run else f"{run:.1f}",
        "run_forecast": _ratio(run_seconds(measured, base) / run),
        "run_forecast_flash2": _ratio(nan if other is None else run_seconds(measured, other) / run),
        "kernels_ms": _ms(busy),
        "kernels_speedup": _ratio(median(base.times.kernels) / busy if times.kernels else nan),
        "kernels_forecast": _ratio(whole),
        "paper": "" if entry is None else entry.paper,
        "error": f"{contender.error:.1e}" if entry is not None else "",
        "rounds": len(times.step),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def _ms(seconds: float) -> str:
    return "" if seconds != seconds else f"{seconds * 1e3:.2f}"


def _ratio(value: float) -> str:
    return "" if value != value else f"{value:.3f}"


def write(rows: Sequence[dict[str, object]], out: Path) -> None:
    """The table, whole or not at all."""
    if not rows:
        return
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows[::-1] for name in row)  # those of earlier runs may lack some
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    if str(out) == "/dev/stdout":
        sys.stdout.write(text.getvalue())
    else:
        write_atomic(out, text.getvalue())


def merged(out: Path, rows: Sequence[dict[str, object]], names: Sequence[str]) -> list[dict[str, object]]:
    """Rows of an earlier run whose cells of `names` are not among those of `rows`, then `rows`."""
    mine = {tuple(str(row[name]) for name in names) for row in rows}
    kept = [row for row in read(out) if tuple(str(row[name]) for name in names) not in mine]
    return kept + list(rows)


def read(path: Path) -> list[dict[str, object]]:
    """Rows of an earlier run; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]
