"""Runs one advice in a process that kills itself in a named stage; test_resume.py starts it.

    python killed.py FOLDER jobs

prints, as JSON lines, for every stage what was left in the folder after the kill, and the recipe of a run that was
killed in all of them beside that of one that was never cut; with several jobs it is cut once. Processes are forked once
everything is imported.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glocal.advise import AdviseOptions, Effort, Frames, Target, Workload, advise, candidates, climb, inside, run
from glocal.advise.state import State
from glocal.advise.timing import MethodTime, Times
from glocal.cli import _advise_job
from glocal.models.generation import SampleSpec, VideoDiT, VideoDiTConfig

FIELDS = (("shape", ("disc", "square")), ("colour", ("red", "green", "blue")))
EFFORT = Effort("tiny", 2, 4, 1, (0.9, 0.7), pairs=2, rounds=1, steps_a_bucket=1, published=1)
METHODS = tuple(candidates((4, 8, 8), tile_shape=(2, 4, 4))[:4])
STAGES = (
    "preflight",
    "times",
    "probe",
    "layer",
    "weights",
    "bucket",
    "mixed",
    "anchors",
    "rung",
    "confirm",
    "pair",
    "write",
)


def make() -> tuple[VideoDiT, Frames]:
    """The model and its objective; also what worker processes load."""
    torch.manual_seed(0)
    made = VideoDiT(VideoDiTConfig(dim=48, layers=2, heads=2, hidden=64, fields=FIELDS)).eval()
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made, Frames(SampleSpec(steps=4), frames=4, height=32, width=32)


def fixed_times(q: Any, k: Any, v: Any, call: Any, methods: Any, *, rounds: int, inner: Any = None) -> Times:
    """Times that do not change from run to run."""
    dense = MethodTime("dense", 1.0, 1.0, 1.0, 1, 0, 0, 1.0, 1.0, "cpu")
    found = {
        n: replace(dense, method=n, median=0.1 + r.plan.visited, visited=r.plan.visited, kept=r.plan.kept)
        for n, r in methods.items()
    }
    return Times(dense, found, None)


def accepted(runs: Any, target: Any) -> Any:
    found = VERDICT(runs, target)
    return replace(found, verdict=replace(found.verdict, accepted=True, failures=()))


VERDICT = climb.verdict_over


def settle() -> None:
    """What depends on the clock is settled, so that a recipe depends on samples alone."""
    inside.times_of = fixed_times  # type: ignore[assignment]
    run._refusal = lambda *args: None  # type: ignore[assignment]
    climb.winners = lambda measured, anchors, target: (sorted(measured, key=lambda r: r.recipe.id), "")  # type: ignore[assignment]
    climb.refined = lambda times, found: times  # type: ignore[assignment]
    climb.verdict_over = accepted


def kill_in(stage: str) -> None:
    """The process dies where a part of `stage` would be kept, or in the middle of writing the outputs."""
    if stage == "write":
        import glocal.report

        glocal.report.render_advice = lambda page: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        return
    keep = State.save
    seen = {"left": 2 if stage in ("bucket", "rung") else 1}  # not the first of many

    def save(self: State, name: str, value: Any) -> None:
        if name.startswith(stage):
            seen["left"] -= 1
            if seen["left"] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        keep(self, name, value)

    State.save = save  # type: ignore[method-assign]


def one(out: Path, jobs: int, *, resume: bool) -> None:
    model, objective = make()
    pairs: list[dict[str, Any]] = [
        dict(zip(("shape", "colour"), p, strict=True)) for p in itertools.product(*(v for _, v in FIELDS))
    ]
    advice = advise(
        model,
        Workload.from_calls(list(pairs), range(len(pairs))),
        objective=objective,
        target=Target(limits={"drift": 1e6}),
        effort=EFFORT,
        options=AdviseOptions(
            candidates=METHODS, min_tokens=64, state=out / "state", resume=resume, jobs=jobs, loader=make
        ),
    )
    _advise_job.write(out, advice, {"device": "here"}, _advise_job.PageWords("tiny", "6", "glocal"))


def forked(out: Path, jobs: int, stage: str | None, *, resume: bool) -> int:
    """Run in a process of its own; the number of the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        settle()
        if stage is not None:
            kill_in(stage)
        one(out, jobs, resume=resume)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def report(out: Path, stage: str | None, ended: int) -> None:
    recipe = out / "recipe.json"
    known = json.loads(recipe.read_text()) if recipe.is_file() else None
    left = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    rules = None if known is None else len(known["rules"])
    print(json.dumps({"stage": stage, "signal": ended, "left": left, "id": known and known["id"], "rules": rules}))
    sys.stdout.flush()


def main() -> None:
    folder, jobs = Path(sys.argv[1]), int(sys.argv[2])
    if jobs > 1:  # the same recipe, whoever does the work; cut once among the pairs
        report(folder / "cut", "pair", forked(folder / "cut", jobs, "pair", resume=False))
        report(folder / "cut", None, forked(folder / "cut", jobs, None, resume=True))
        return
    for number, stage in enumerate(STAGES):
        report(folder / "cut", stage, forked(folder / "cut", jobs, stage, resume=number > 0))
        if number == 0:  # killed before anything was kept: the state names its job, and that can be gone on from
            report(folder / "cut", "nothing kept", forked(folder / "cut", jobs, "preflight", resume=True))
    report(folder / "cut", None, forked(folder / "cut", jobs, None, resume=True))
    report(folder / "whole", None, forked(folder / "whole", 1, None, resume=False))


if __name__ == "__main__":
    main()
