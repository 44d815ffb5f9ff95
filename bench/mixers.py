"""The eleven token mixers in one small backbone on equal terms, into results/mixers.csv and results/mixers.svg.

python bench/mixers.py --device cuda --workers 11 --graph    # train all runs, several at once
python bench/mixers.py --device cuda --workers 11 --examine  # times and memory, one mixer at a time: no runs beside it
python bench/mixers.py --device cpu --size 64 --steps 4 --seeds 2 --batch 8 --train 64 --test 32 --out out/mixers
python bench/mixers.py --mixers my.py:Mine,hilo,biformer    # a mixer of your own beside ours

Runs lie in --out and are not repeated; --seconds ends a call, and the next one goes on. Scenes are painted once and
handed to the workers in a file. Times and memory in the table are those of --examine, before or after training; what
was not measured, and scores of what was not trained, are empty. The table is written after each run that completes a
seed of all mixers. --graph: an update is one CUDA graph, so that the host does not count.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from glocal._files import write_atomic
from glocal.bench.mixer_suite import COLUMNS, COUNTS, SPEC, picture, table
from glocal.bench.mixers import ENTRIES, Entry, Frame, MixerSpec, Task, measured, planned, run_folder, task_of, trained
from glocal.bench.suites import table as as_csv
from glocal.data.labelled import Stored
from glocal.train.vision import Trainer

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "mixers.csv"


def work(a: argparse.Namespace, spec: MixerSpec, found: dict[str, Entry]) -> None:
    """The runs that no other worker has taken, each worker beginning at its own."""
    task = loaded(a.out / "scenes.pt", task_of(a.task, size=a.size, device="cpu", counts=(1, 1)), a.device)
    runs = [(seed, entry) for seed in range(spec.seeds) for entry in found.values() if not entry.reason]
    for seed, entry in [*runs[a.child :], *runs[: a.child]]:
        frame = replace(spec.frame, mlp_ratio=entry.mlp_ratio)
        begin, name = time.monotonic(), f"{entry.mixer} seed {seed}"

        def told(trainer: Trainer, name: str = name) -> None:
            row = trainer.curve[-1]
            print(f"{name}: {row.step} updates, loss {row.loss:.3f}, {row.seconds:.0f} s", flush=True)

        with taken(run_folder(a.out, entry.mixer, seed)) as mine:
            if mine:
                score, seconds = trained(entry.mixer, task, replace(spec, frame=frame), seed, a.out, told)
                spent = time.monotonic() - begin
                print(f"{name}: {score:.4f} in {seconds:.0f} s ({spent:.0f} s)", flush=True)


@contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Whether the run of `folder` is this worker's while the context lasts; a worker that ends gives its runs free."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "taken").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def look(a: argparse.Namespace, spec: MixerSpec, found: dict[str, Entry]) -> None:
    """Times and memory of the mixers of one worker, each alone on the device while it is timed."""
    task = task_of(a.task, size=a.size, device=a.device, counts=(a.batch, 1))

    @contextmanager
    def alone() -> Iterator[None]:
        with (a.out / "turn").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            yield

    for number, entry in enumerate(found.values()):
        if number % a.workers == a.child and not entry.reason:
            e = measured(entry, task, spec, alone)
            place = run_folder(a.out, e.mixer, 0).with_name(f"examined-{number}.json")
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, json.dumps(asdict(e)).encode())
            print(f"{e.mixer}: {e.step_seconds * 1e3:.1f} ms a step, {e.images_s:.0f} images/s", flush=True)


def saved(task: Task, path: Path) -> None:
    """Write the scenes of a task for other processes."""
    assert isinstance(task.train, Stored) and isinstance(task.test, Stored)
    parts = {
        f"{name} {what}": getattr(data, what).cpu()
        for name, data in (("train", task.train), ("test", task.test))
        for what in ("images", "targets")
    }
    torch.save(parts, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def loaded(path: Path, like: Task, device: str) -> Task:
    """The task whose scenes are being saved; `like` has its name, size and classes."""
    while not path.is_file():
        time.sleep(0.1)
    parts = torch.load(path, map_location=device, weights_only=True)
    train, test = (
        Stored(parts[f"{name} images"], parts[f"{name} targets"], like.train.classes) for name in ("train", "test")
    )
    return replace(like, train=train, test=test)


def known(out: Path) -> dict[str, Entry]:
    """What was planned, with the times of --examine."""
    entries = [Entry(**{**e, "scores": tuple(e["scores"])}) for e in json.loads((out / "planned.json").read_text())]
    for number, entry in enumerate(entries):
        file = out / "runs" / f"examined-{number}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            entries[number] = replace(entry, **{name: found[name] for name in ("step_seconds", "images_s", "memory")})
    return {e.mixer: e for e in entries}


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


def run(a: argparse.Namespace, told: Callable[[], None]) -> bool:
    """Start the workers, paint their scenes, wait for them; whether all came through. told: called now and then."""
    end = time.monotonic() + a.seconds
    command = [sys.executable, *sys.argv]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # workers would fight for the cores
    children = [subprocess.Popen([*command, "--child", str(i)], env=alone) for i in range(a.workers)]
    if not a.examine:
        begin = time.monotonic()
        saved(task_of(a.task, size=a.size, device=a.device, counts=(a.train, a.test)), a.out / "scenes.pt")
        print(f"scenes painted in {time.monotonic() - begin:.0f} s", flush=True)
    while time.monotonic() < end and any(child.poll() is None for child in children):
        time.sleep(1.0)
        told()
    for child in children:
        if child.poll() is None:
            child.terminate()
    codes = [child.wait() for child in children]
    (a.out / "scenes.pt").unlink(missing_ok=True)
    return not any(codes)


def main() -> None:
    """Read the arguments and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--task", default="classification")
    p.add_argument("--size", type=int)
    p.add_argument("--mixers", default=",".join(ENTRIES))
    p.add_argument("--match", default="params", choices=("params", "flops", "none"))
    p.add_argument("--steps", type=int, default=SPEC.steps)
    p.add_argument("--seeds", type=int, default=SPEC.seeds)
    p.add_argument("--batch", type=int, default=SPEC.batch)
    p.add_argument("--train", type=int, default=COUNTS[0])
    p.add_argument("--test", type=int, default=COUNTS[1])
    p.add_argument("--dims", default=",".join(map(str, SPEC.frame.dims)), help="channels of the levels")
    p.add_argument("--depths", default=",".join(map(str, SPEC.frame.depths)))
    p.add_argument("--head-dim", type=int, default=SPEC.frame.head_dim)
    p.add_argument("--lr", type=float, default=SPEC.lr)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--seconds", type=float, default=1e9, help="the time after which runs are left for another call")
    p.add_argument("--examine", action="store_true")
    p.add_argument("--graph", action="store_true")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "mixers")
    p.add_argument("--csv", type=Path, default=CSV)
    p.add_argument("--child", type=int)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    dims, depths = (tuple(int(n) for n in text.split(",")) for text in (a.dims, a.depths))
    spec = MixerSpec(
        a.steps, match=a.match, seeds=a.seeds, batch=a.batch, lr=a.lr, device=a.device,
        precision="no" if a.device == "cpu" else "bf16", graph=a.graph, frame=Frame(dims, depths, a.head_dim),
    )  # fmt: skip
    if a.child is not None:
        (look if a.examine else work)(a, spec, known(a.out))
        return
    few = task_of(a.task, size=a.size, device="cpu", counts=(1, 1))
    if not (a.out / "planned.json").is_file():
        plans = planned(a.mixers.split(","), few, spec)
        write_atomic(a.out / "planned.json", json.dumps([asdict(e) for e in plans.values()], indent=1).encode())
        for e in plans.values():
            print(e.mixer, e.reason or f"{e.params:,} parameters, MLPs of {e.mlp_ratio}", flush=True)
    seeds = [0]  # in the table so far

    def told() -> None:
        entries = results(known(a.out), few, spec, a.out)
        most = max(len(e.scores) for e in entries)
        if most > seeds[0]:
            seeds[0] = most
            write(entries)

    def write(entries: list[Entry]) -> list[tuple[Any, ...]]:
        lines = table(entries, few, replace(spec, seeds=max(1, *(len(e.scores) for e in entries))))
        write_atomic(a.csv, as_csv(COLUMNS, lines).encode())
        if any(e.scores and e.images_s > 0 for e in entries):
            write_atomic(a.csv.with_suffix(".svg"), picture(entries, few.score).encode())
        return lines

    fine = run(a, told)
    entries = results(known(a.out), few, spec, a.out)
    if any(e.scores or e.images_s > 0 for e in entries):
        for line in write(entries):
            row = dict(zip(COLUMNS, line, strict=True))
            print(
                {k: row[k] for k in ("mixer", "mean", "spread", "params", "mmacs", "images_s", "step_ms", "step_mib")}
            )
    raise SystemExit(not fine)


if __name__ == "__main__":
    main()
