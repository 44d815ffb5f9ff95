"""The eleven token mixers in one small backbone on equal terms, into results/mixers.csv and results/mixers.svg.

python bench/mixers.py --device cuda --workers 6            # examine, then train all runs, several at once
python bench/mixers.py --device cuda --examine              # only sizes, times and memory: alone on the device
python bench/mixers.py --device cpu --size 64 --steps 4 --seeds 2 --batch 8 --train 64 --test 32 --out out/mixers

Runs lie in --out and are not repeated. Times of --examine are what the table shows; those that a training job measures
while other runs share the device are not used.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from glocal._files import write_atomic
from glocal.bench.mixers import ENTRIES, Entry, Frame, MixerSpec, Task, compared, examine, task_of, trained

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "mixers.csv"


def work(a: argparse.Namespace, task: Task, spec: MixerSpec, found: dict[str, Entry]) -> None:
    """The runs of one worker: every `workers`-th of all."""
    runs = [(seed, e) for seed in range(spec.seeds) for e in found.values() if not e.reason]
    for number, (seed, entry) in enumerate(runs):
        if number % a.workers == a.child:
            frame = replace(spec.frame, mlp_ratio=entry.mlp_ratio)
            begin = time.monotonic()
            score, seconds = trained(entry.mixer, task, replace(spec, frame=frame), seed, a.out)
            spent = time.monotonic() - begin
            print(f"{entry.mixer} seed {seed}: {score:.4f} in {seconds:.0f} s ({spent:.0f} s)", flush=True)


def rows(task: Task, spec: MixerSpec, found: dict[str, Entry], device: str) -> list[dict[str, object]]:
    """Lines of the table, best first."""
    ready = sorted(found.values(), key=lambda e: (bool(e.reason), -e.mean if e.scores else 0.0))
    base = next((e.mixer for e in ready if e.scores), "")
    apart = compared(ready, base) if base else {}
    lines = []
    for e in ready:
        mean, low, high = apart.get(e.mixer, (0.0, 0.0, 0.0))
        lines.append(
            {
                "task": task.name,
                "size": task.size,
                "mixer": e.mixer,
                "score": task.score,
                "mean": f"{e.mean:.4f}",
                "spread": f"{e.spread:.4f}",
                "scores": " ".join(f"{s:.4f}" for s in e.scores),
                "to_best": f"{mean:.4f}",
                "to_best_low": f"{low:.4f}",
                "to_best_high": f"{high:.4f}",
                "params": e.params,
                "mmacs": f"{e.macs / 1e6:.1f}",
                "mlp_ratio": e.mlp_ratio,
                "images_s": f"{e.images_s:.0f}",
                "step_ms": f"{e.step_seconds * 1e3:.1f}",
                "step_mib": f"{e.memory / 2**20:.0f}",
                "train_s": f"{e.seconds:.0f}",
                "steps": spec.steps,
                "batch": spec.batch,
                "seeds": spec.seeds,
                "match": spec.match,
                "reason": e.reason,
                "device": device,
                "torch": torch.__version__,
            }
        )
    return lines


def main() -> None:
    """Read the arguments and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--task", default="classification")
    p.add_argument("--size", type=int)
    p.add_argument("--mixers", default=",".join(ENTRIES))
    p.add_argument("--match", default="params")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--train", type=int, default=20_000)
    p.add_argument("--test", type=int, default=2_000)
    p.add_argument("--dims", default="48,96,192,288", help="channels of the levels")
    p.add_argument("--depths", default="2,2,4,2")
    p.add_argument("--head-dim", type=int, default=24)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--examine", action="store_true")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "mixers")
    p.add_argument("--csv", type=Path, default=CSV)
    p.add_argument("--child", type=int)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    task = task_of(a.task, size=a.size, device=a.device, counts=(a.train, a.test))
    dims, depths = (tuple(int(n) for n in text.split(",")) for text in (a.dims, a.depths))
    spec = MixerSpec(
        a.steps, match=a.match, seeds=a.seeds, batch=a.batch, lr=a.lr, device=a.device,
        precision="no" if a.device == "cpu" else "bf16", frame=Frame(dims, depths, a.head_dim),
    )  # fmt: skip
    known = a.out / "examined.json"
    if a.child is not None:
        work(a, task, spec, {e["mixer"]: _entry(e) for e in json.loads(known.read_text())})
        return
    if a.examine or not known.is_file():
        found = examine(a.mixers.split(","), task, spec)
        write_atomic(known, json.dumps([asdict(e) for e in found.values()], indent=1).encode())
        for e in found.values():
            print(e.mixer, e.reason or f"{e.step_seconds * 1e3:.1f} ms a step, {e.images_s:.0f} images/s", flush=True)
    if a.examine:
        return
    found = {e["mixer"]: _entry(e) for e in json.loads(known.read_text())}
    command = [sys.executable, *sys.argv]
    children = [subprocess.Popen([*command, "--child", str(i)]) for i in range(a.workers)]
    failed = [child.args for child in children if child.wait() != 0]
    for e in list(found.values()):
        frame = replace(spec.frame, mlp_ratio=e.mlp_ratio)
        done = [trained(e.mixer, task, replace(spec, frame=frame), s, a.out) for s in range(spec.seeds) if not e.reason]
        scores, seconds = tuple(score for score, _ in done), sum(s for _, s in done)
        found[e.mixer] = replace(e, scores=scores, seconds=seconds)
    device = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    table = rows(task, spec, found, device)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomic(a.csv, text.getvalue().encode())
    for line in table:
        print({k: line[k] for k in ("mixer", "mean", "spread", "params", "mmacs", "images_s", "step_ms", "step_mib")})
    raise SystemExit(bool(failed))


def _entry(record: dict) -> Entry:
    return Entry(**{**record, "scores": tuple(record["scores"])})


if __name__ == "__main__":
    main()
