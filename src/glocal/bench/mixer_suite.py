"""`glocal bench mixers`: token mixers in one small backbone on equal terms; names, and classes of your own files.

    glocal bench mixers --case hilo --case my.py:Mine

Runs are kept under out/mixers and an interrupted suite goes on. bench/mixers.py does the same with several at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glocal.bench.mixers import ENTRIES, Entry, Frame, MixerSpec, Task, compared, mixers, task_of
from glocal.bench.suites import Options
from glocal.nn.mixer import builder_of
from glocal.report.charts.scatter import Dot, scatter

WORDS = "mixers: token mixers in one backbone, equal parameters, data and updates"
COLUMNS = (
    "task", "size", "mixer", "score", "mean", "spread", "scores", "to_best", "to_best_low", "to_best_high", "params",
    "mmacs", "mlp_ratio", "images_s", "step_ms", "step_mib", "train_s", "steps", "batch", "seeds", "match", "reason",
    "device", "versions",
)  # fmt: skip
SPEC = MixerSpec(steps=1000, frame=Frame(depths=(2, 2, 2, 2)))
SIZE, COUNTS = 112, (8_000, 1_000)  # px; scenes to learn from and to test on
FOLDER = Path("out/mixers")


def run(options: Options) -> list[tuple[Any, ...]]:
    """Train every mixer of `options.cases` (None: the eleven) with every seed; rows of COLUMNS."""
    device = options.device
    spec = replace(SPEC, device=device, precision="no" if device == "cpu" else "bf16")
    names = ENTRIES if options.cases is None else options.cases
    for name in names:
        builder_of(name)  # a misspelt one is told before the scenes are made
    task = task_of("classification", size=SIZE, device=device, counts=COUNTS)
    found = mixers(names, task, spec, FOLDER, options.progress)
    rows = table(found, task, spec)
    options.emit(rows)
    return rows


def wrong(records: list[dict[str, Any]]) -> list[str]:
    """Mixers that did not run, with the reason."""
    return [f"{record['mixer']} did not run: {record['reason']}" for record in records if record["reason"]]


def table(found: Iterable[Entry], task: Task, spec: MixerSpec) -> list[tuple[Any, ...]]:
    """Rows of COLUMNS, best mean first, those that cannot run last; to_best: mean difference to the best, by seed.

    Scores of entries that were not trained, and costs of those that were not measured, are empty.
    """
    ready = sorted(found, key=lambda e: (bool(e.reason), -e.mean if e.scores else 0.0))
    base = next((e.mixer for e in ready if e.scores), None)
    apart = {} if base is None else compared(ready, base)
    device = torch.cuda.get_device_name(spec.device) if spec.device.startswith("cuda") else "cpu"
    rows = []
    for e in ready:
        scores, difference = " ".join(f"{s:.4f}" for s in e.scores), apart.get(e.mixer, (0.0, 0.0, 0.0))
        quality = (f"{e.mean:.4f}", f"{e.spread:.4f}", scores, *(f"{n:.4f}" for n in difference))
        quality = quality if e.scores else ("",) * len(quality)
        cost = (f"{e.images_s:.0f}", f"{e.step_seconds * 1e3:.1f}", f"{e.memory / 2**20:.0f}")
        cost = cost if e.images_s > 0 else ("",) * len(cost)
        size = (e.params, f"{e.macs / 1e6:.1f}", e.mlp_ratio)
        taken = (f"{e.seconds:.0f}", spec.steps, spec.batch, spec.seeds) if e.scores else ("", "", spec.batch, "")
        how = (*taken, spec.match, e.reason, device, f"torch {torch.__version__}")
        rows.append((task.name, task.size, e.mixer, task.score, *quality, *size, *cost, *how))
    return rows


def picture(found: Iterable[Entry], score: str) -> str:
    """SVG: images a second against the mean score, with its spread over seeds."""
    dots = [Dot(Path(e.mixer).name, e.images_s, e.mean, e.spread) for e in found if e.scores and e.images_s > 0]
    return scatter(dots, "images a second, forward", score)
