"""A run that was cut goes on: kill -9 in every stage, nothing half-written, the recipe of a run that was never cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glocal.advise import AdviceError, AdviseOptions, Frames, Workload, advise
from glocal.advise.farm import Farm, Task
from glocal.advise.state import State
from glocal.models.generation import VideoDiT

DRIVER = Path(__file__).with_name("killed.py")
Rows = list[dict[str, object]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Rows]:
    def run(jobs: int) -> Rows:
        folder = tmp_path_factory.mktemp("killed")
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(folder), str(jobs)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are of POSIX systems")
@pytest.mark.slow
def test_killed_in_every_stage_and_resumed_gives_the_same_recipe(killed: Callable[[int], Rows]) -> None:
    *cut, resumed, whole = killed(1)
    assert [row["stage"] for row in cut if row["stage"] != "nothing kept"] == [
        *(
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
    ]
    assert all(row["signal"] == 9 for row in cut), cut
    assert all(row["left"] == ["state"] for row in cut), "something half-written was left"
    assert resumed["signal"] == whole["signal"] == 0
    assert resumed["left"] == whole["left"] == ["evidence.jsonl", "recipe.json", "report.html", "state"]
    assert resumed["id"] == whole["id"] and resumed["rules"] and resumed["rules"] == whole["rules"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are of POSIX systems")
@pytest.mark.slow
def test_several_processes_killed_and_resumed_find_a_recipe(killed: Callable[[int], Rows]) -> None:
    shared_cut, shared = killed(2)
    assert shared_cut["signal"] == 9 and shared_cut["left"] == ["state"]
    assert shared["left"] == ["evidence.jsonl", "recipe.json", "report.html", "state"]
    assert shared["id"] and shared["rules"]


def tensors(state: State) -> list[str]:
    assert state.folder is not None
    return sorted(str(p.relative_to(state.folder)) for p in state.folder.rglob("*.pt"))


def test_a_finished_part_is_not_made_again(tmp_path: Path) -> None:
    state = State(tmp_path / "state", {"model": "a"})
    made: list[int] = []

    def make() -> tuple[int, torch.Tensor]:
        made.append(1)
        return 3, torch.arange(4)

    first, again = state.once("probe/s 0", make), State(tmp_path / "state", {"model": "a"}, resume=True)
    second = again.once("probe/s 0", make)
    assert made == [1] and first[0] == second[0] and torch.equal(first[1], second[1])
    assert tensors(state) == ["probe/s_0.pt"]


def test_another_job_an_unfinished_one_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--resume: .* holds no state of a run; leave --resume out"):
        State(tmp_path / "state", {"model": "a"}, resume=True)
    state = State(tmp_path / "state", {"model": "a", "effort": "quick"})
    with pytest.raises(ValueError, match=r"belongs to a run with effort='quick', this one has 'standard'"):
        State(tmp_path / "state", {"model": "a", "effort": "standard"}, resume=True)
    with pytest.raises(ValueError, match="holds an unfinished run; go on with --resume, or remove"):
        State(tmp_path / "state", {"model": "b"})
    state.finish()
    assert not tensors(State(tmp_path / "state", {"model": "b"}))


def test_state_reads_nothing_but_its_own_records(tmp_path: Path) -> None:
    state = State(tmp_path / "state", {})
    state.save("evil", Path("x"))
    with pytest.raises(Exception, match="Weights only load failed|Unsupported"):
        state.load("evil")


def test_a_stop_forgets_its_state(model: VideoDiT, workload: Workload, objective: Frames, tmp_path: Path) -> None:
    """Going on would stop at the same place, so there is nothing to go on from."""
    options = AdviseOptions(state=tmp_path / "out" / "state", budget=1e-6, min_tokens=64)
    with pytest.raises(AdviceError, match="the budget 0.0 s"):
        advise(model, workload, objective=objective, effort="quick", options=options)
    assert not list(tmp_path.iterdir())


def add(model: int, objective: int, number: int) -> int:
    if number < 0:
        raise ValueError("negative")
    return model + objective + number


def load() -> tuple[int, int]:
    return 10, 20


@pytest.mark.slow
def test_processes_share_the_tasks_and_keep_what_is_finished(tmp_path: Path) -> None:
    state = State(tmp_path / "state", {})
    state.save("t/0", 7)  # finished before
    failed: list[str] = []
    with Farm(0, 0, state, jobs=2, loader=load) as farm:
        tasks = [Task(f"t/{n}", add, (n if n != 2 else -1,)) for n in range(4)]
        found = farm.map(tasks, fail=lambda task, error: failed.append(f"{task.name}: {error}"))
    assert found == [7, 31, None, 33] and failed == ["t/2: negative"]
    assert tensors(state) == ["t/0.pt", "t/1.pt", "t/3.pt"]


def test_several_processes_need_a_loader() -> None:
    with pytest.raises(ValueError, match="jobs=2: every process loads the model itself; give options.loader"):
        Farm(0, 0, State(None, {}), jobs=2)
    with pytest.raises(ValueError, match="jobs=0; legal: at least 1"):
        Farm(0, 0, State(None, {}), jobs=0)
