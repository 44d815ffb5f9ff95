"""glocal compare --train: token mixers, one's own among them, trained in one backbone on equal terms."""

from __future__ import annotations

import csv
import io
import json as _json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glocal._files import write_atomic
from glocal.cli._common import check_folder, plain, print_fields, print_json, print_table, progress
from glocal.cli._machine import facts

if TYPE_CHECKING:
    from glocal.bench.mixers import Entry

COLUMNS = (
    "mixer", "score", "spread", "to best", "low", "high", "parameters", "M MACs", "images/s", "step ms", "step MiB",
)  # fmt: skip


def run(options: dict[str, Any]) -> None:
    """The verb, with its options by name."""
    from glocal.advise.forecast import parse_duration
    from glocal.bench.mixers import ENTRIES, MixerSpec, compared, mixers, task_of
    from glocal.nn.mixer import builder_of

    out: Path | None = options["out"]
    check_folder(out)
    names = ENTRIES if options["mixers"] is None else tuple(n.strip() for n in options["mixers"].split(","))
    for name in names:
        builder_of(name)  # a misspelt one is told before the scenes are made
    budget = None if options["budget"] is None else parse_duration(options["budget"], "--budget")
    steps = options["steps"] if options["steps"] is not None or budget is not None else 500
    spec = MixerSpec(
        steps, budget, options["match"], options["seeds"], options["batch"], device=options["device"],
        precision="no" if options["device"] == "cpu" else "bf16",
    )  # fmt: skip
    counts = (options["samples"], max(options["samples"] // 10, 1))
    task = task_of(options["task"], options["data"], options["size"], options["device"], counts)
    bar = progress(options["quiet"] or options["json"])
    try:
        found = mixers(names, task, spec, out, bar)
    finally:
        bar.close()
    known = {
        **facts(options["device"]),
        "task": f"{task.name}, {task.size} px, {len(task.train):,} to learn from, {len(task.test):,} to test on",
        "score": task.score,
        "equal": {"none": "nothing but the frame"}.get(spec.match, spec.match),
    }
    best = next(e.mixer for e in found if e.scores)
    apart = compared(found, best)
    rows = [_cells(e, apart) for e in found if not e.reason]
    if out is not None:
        _write(out, rows, found, known)
    if options["json"]:
        print_json({"facts": known, "entries": [plain(asdict(e)) for e in found], "to_best": apart})
        return
    print_fields(known)
    print()
    print_table(COLUMNS, rows)
    for entry in found:
        if entry.reason:
            print(f"{entry.mixer} did not run: {entry.reason}")
    print(f"\nto best: mean difference to {best!r}, paired by seed; low, high: 95 % over all comparisons together.")
    if out is not None:
        print(f"written: {out / 'mixers.csv'}, mixers.svg, mixers.json")


def _cells(e: Entry, apart: dict[str, tuple[float, float, float]]) -> tuple[Any, ...]:
    difference = apart.get(e.mixer, (0.0, None, None))
    return (
        e.mixer, e.mean, e.spread, *difference, e.params, e.macs / 1e6, e.images_s, e.step_seconds * 1e3,
        e.memory / 2**20 if e.memory else None,
    )  # fmt: skip


def _write(out: Path, rows: list[tuple[Any, ...]], found: tuple[Entry, ...], known: dict[str, str]) -> None:
    from glocal.report.charts.scatter import Dot, scatter

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    write_atomic(out / "mixers.csv", text.getvalue().encode())
    dots = [Dot(Path(e.mixer).name, e.images_s, e.mean, e.spread) for e in found if e.scores]
    picture = scatter(dots, "images a second, forward", known["score"])
    write_atomic(out / "mixers.svg", picture.encode())
    record = {"facts": known, "entries": [plain(asdict(e)) for e in found]}
    write_atomic(out / "mixers.json", (_json.dumps(record, indent=1) + "\n").encode())
