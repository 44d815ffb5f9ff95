"""The eleven token mixers in one small backbone on equal terms, into results/mixers.csv and results/mixers.svg.

python bench/mixers.py --device cuda --workers 11           # examine, then train all runs, several at once
python bench/mixers.py --device cuda --examine              # only sizes, times and memory: alone on the device
python bench/mixers.py --device cpu --size 64 --steps 4 --seeds 2 --batch 8 --train 64 --test 32 --out out/mixers
python bench/mixers.py --mixers my.py:Mine,hilo,biformer    # a mixer of your own beside ours

Runs lie in --out and are not repeated. Scenes are painted once and handed to the workers in a file. Times of --examine
are what the table shows; those that a training job measures while other runs share the device are not used.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from glocal._files import write_atomic
from glocal.bench.mixer_suite import COLUMNS, COUNTS, SPEC, picture, table
from glocal.bench.mixers import ENTRIES, Entry, Frame, MixerSpec, Task, examine, run_folder, task_of, trained
from glocal.bench.suites import table as as_csv
from glocal.data.labelled import Stored

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


def saved(task: Task, path: Path) -> None:
    """Write the scenes of a task for other processes."""
    assert isinstance(task.train, Stored) and isinstance(task.test, Stored)
    parts = {
        f"{name} {what}": getattr(data, what).cpu()
        for name, data in (("train", task.train), ("test", task.test))
        for what in ("images", "targets")
    }
    torch.save(parts, path)


def loaded(path: Path, like: Task, device: str) -> Task:
    """The task whose scenes were saved; `like` has its name, size and classes."""
    parts = torch.load(path, map_location=device, weights_only=True)
    train, test = (
        Stored(parts[f"{name} images"], parts[f"{name} targets"], like.train.classes) for name in ("train", "test")
    )
    return replace(like, train=train, test=test)


def known(path: Path) -> dict[str, Entry]:
    """What was examined."""
    return {e["mixer"]: Entry(**{**e, "scores": tuple(e["scores"])}) for e in json.loads(path.read_text())}


def results(found: dict[str, Entry], task: Task, spec: MixerSpec, out: Path) -> list[Entry]:
    """Entries with the scores of the runs that are finished, those of equal seeds for all."""
    done: dict[str, list[tuple[float, float]]] = {}
    for name, e in found.items():
        frame = replace(spec.frame, mlp_ratio=e.mlp_ratio)
        runs = []
        for seed in range(spec.seeds if not e.reason else 0):
            if not (run_folder(out, name, seed) / "done.json").is_file():
                break
            runs.append(trained(name, task, replace(spec, frame=frame), seed, out))
        done[name] = runs
    whole = min((len(runs) for name, runs in done.items() if not found[name].reason), default=0)
    return [
        replace(e, scores=tuple(s for s, _ in done[n][:whole]), seconds=sum(t for _, t in done[n][:whole]))
        for n, e in found.items()
    ]


def main() -> None:
    """Read the arguments and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--task", default="classification")
    p.add_argument("--size", type=int)
    p.add_argument("--mixers", default=",".join(ENTRIES))
    p.add_argument("--match", default="params")
    p.add_argument("--steps", type=int, default=SPEC.steps)
    p.add_argument("--seeds", type=int, default=SPEC.seeds)
    p.add_argument("--batch", type=int, default=SPEC.batch)
    p.add_argument("--train", type=int, default=COUNTS[0])
    p.add_argument("--test", type=int, default=COUNTS[1])
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
    dims, depths = (tuple(int(n) for n in text.split(",")) for text in (a.dims, a.depths))
    spec = MixerSpec(
        a.steps, match=a.match, seeds=a.seeds, batch=a.batch, lr=a.lr, device=a.device,
        precision="no" if a.device == "cpu" else "bf16", frame=Frame(dims, depths, a.head_dim),
    )  # fmt: skip
    examined, scenes = a.out / "examined.json", a.out / "scenes.pt"
    if a.child is not None:
        few = task_of(a.task, size=a.size, device="cpu", counts=(1, 1))
        work(a, loaded(scenes, few, a.device), spec, known(examined))
        return
    task = task_of(a.task, size=a.size, device=a.device, counts=(a.train, a.test))
    if a.examine or not examined.is_file():
        found = examine(a.mixers.split(","), task, spec)
        write_atomic(examined, json.dumps([asdict(e) for e in found.values()], indent=1).encode())
        for e in found.values():
            print(e.mixer, e.reason or f"{e.step_seconds * 1e3:.1f} ms a step, {e.images_s:.0f} images/s", flush=True)
    failed = []
    if not a.examine:
        saved(task, scenes)
        command = [sys.executable, *sys.argv]
        children = [subprocess.Popen([*command, "--child", str(i)]) for i in range(a.workers)]
        failed = [child.args for child in children if child.wait() != 0]
        scenes.unlink()
    entries = results(known(examined), task, spec, a.out)
    if not any(e.scores for e in entries):
        raise SystemExit(bool(failed))
    lines = table(entries, task, replace(spec, seeds=max(len(e.scores) for e in entries)))
    write_atomic(a.csv, as_csv(COLUMNS, lines).encode())
    write_atomic(a.csv.with_suffix(".svg"), picture(entries, task.score).encode())
    for line in lines:
        row = dict(zip(COLUMNS, line, strict=True))
        print({k: row[k] for k in ("mixer", "mean", "spread", "params", "mmacs", "images_s", "step_ms", "step_mib")})
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
