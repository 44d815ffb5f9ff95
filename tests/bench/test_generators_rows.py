"""The driver of the generators: what it puts together from blocks and rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
DENSE = {"some kernel": 0.002, "another": 0.003, "a guest": nan}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Modules of bench/generation."""
    monkeypatch.syspath_prepend(str(BENCH))
    from generation import cases, measure, rows  # type: ignore[import-not-found]

    yield cases, measure, rows
    for name in [n for n in sys.modules if n.partition(".")[0] == "generation"]:
        del sys.modules[name]


def contender(measure: Any, entry: Any, block: tuple[float, ...], rest: float = 1.0) -> Any:
    """Two rounds, the second twice as slow."""
    times = measure.Times()
    for factor in (1.0, 2.0):
        times.step.append(factor)
        times.attention.append(factor * (block[0] if block else nan) / 2)
        times.blocks.append(tuple(factor * b for b in block))
        times.rest.append(factor * rest)
    return measure.Contender(entry, error=1e-3, pairs=8, times=times)


def test_a_whole_step_is_the_rest_and_all_blocks(parts: Any) -> None:
    cases, measure, rows = parts
    case = next(c for c in cases.CASES if c.name.startswith("hunyuanvideo 117"))
    entry = replace(case.entries[0], dense_steps=10, dense_layers=(4, 0))
    dense, fast = contender(measure, None, (2.0, 3.0)), contender(measure, entry, (1.0, 1.5))
    measured = measure.Measured(
        case, SimpleNamespace(kernel="some kernel", dense=DENSE), {"dense": dense, entry.name: fast}, []
    )
    assert rows.whole_step(measured, dense, 0) == 1 + 20 * 2 + 40 * 3
    assert rows.whole_step(measured, fast, 1) == 2 * (1 + 20 * 1 + 40 * 1.5)
    assert rows.whole_step(measured, fast, 0, (4, 0)) == 1 + 16 * 1 + 4 * 2 + 40 * 1.5
    steps, whole, mixed = case.steps, 1.5 * 161.0, 1.5 * 85.0  # medians of two rounds
    assert rows.run_seconds(measured, dense) == pytest.approx(steps * whole)
    assert rows.run_seconds(measured, fast) == pytest.approx(10 * whole + (steps - 10) * mixed)
    table = rows.rows_of(measured)
    assert [row["method"] for row in table] == ["dense", entry.name]
    assert table[1]["step_speedup"] == f"{161 / 81:.3f}" and table[1]["attention_speedup"] == "2.000"
    assert table[0]["run_forecast"] == "1.000" and table[1]["paper"] == entry.paper
    assert table[0]["kernel"] == "some kernel"
    said = "some kernel 2.00, another 3.00, a guest refused"
    assert [row["dense_ms_a_call"] for row in table] == [said, ""]


def test_steps_of_several_kinds_make_one_run(parts: Any) -> None:
    cases, measure, rows = parts
    case = next(c for c in cases.CASES if c.name == "sdxl 2048x2048")
    found = {"dense": contender(measure, None, (), 10.0)}
    for entry, rest in zip(case.entries, (4.0, 5.0, 8.0), strict=True):
        found[entry.name] = contender(measure, entry, (), rest)
    measured = measure.Measured(case, SimpleNamespace(kernel="some kernel", dense=DENSE), found, [])
    whole = 50 * 10.0 / (8 * 4.0 + 12 * 5.0 + 30 * 8.0)
    assert {row["run_forecast"] for row in rows.rows_of(measured)} == {"1.000", f"{whole:.3f}"}
    assert {row["kernels_forecast"] for row in rows.rows_of(measured)} == {""}  # nobody counted them
    for one, busy in zip(found.values(), (6.0, 1.0, 2.0, 5.0), strict=True):
        one.times.kernels.extend([busy, busy])
    table = rows.rows_of(measured)
    assert [row["kernels_speedup"] for row in table] == ["1.000", "6.000", "3.000", "1.200"]
    assert {row["kernels_forecast"] for row in table} == {"1.000", f"{50 * 6.0 / (8 * 1.0 + 12 * 2.0 + 30 * 5.0):.3f}"}
    del found[case.entries[1].name]  # a run lacks the steps of a part that failed
    assert [row["run_s"] for row in rows.rows_of(measured)] == ["750.0", "", ""]


def test_published_steps_of_a_case_are_as_many_as_its_run(parts: Any) -> None:
    cases, _, _ = parts
    for case in cases.CASES:
        shared = [e.steps for e in case.entries if e.group]
        assert not shared or sum(shared) == case.steps
        assert len(case.layers) == len(case.kind.stacks) or not case.kind.stacks


def test_a_dense_kernel_that_fails_is_told_and_no_rival(
    parts: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from generation import models, timing  # type: ignore[import-not-found]

    took = {"sdpa cudnn": 4.0, "fa4_dense": 2.0, "gluon": 3.0}
    clock = [0.0]

    def dense(kernel: str, *qkv: Any) -> None:
        if kernel not in took:
            raise TypeError("no such kernel\nand more")
        clock[0] = took[kernel]

    def seconds(run: Any, device: Any) -> float:
        run()
        return clock[0]

    monkeypatch.setattr(timing, "dense", dense)
    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "draw", lambda *_: None)
    found = timing.dense_times(models.WAN, 1000, SimpleNamespace(type="cuda"), None)
    assert (
        list(found) == ["fa4_dense", "gluon", "sdpa cudnn", "sdpa flash"] and found["sdpa flash"] != found["sdpa flash"]
    )
    assert timing.told(found) == "fa4_dense 2000.00, gluon 3000.00, sdpa cudnn 4000.00, sdpa flash refused"
    assert "sdpa flash: TypeError: no such kernel" in capsys.readouterr().out


def test_a_process_that_stands_still_says_where_and_ends(parts: Any) -> None:
    run = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from generation.measure import Options\n"
        "import torch\n"
        "options = Options(torch.device('cpu'), torch.float32, patience=0.3)\n"
        "with options.waits(): pass\n"
        "time.sleep(0.6); print('goes on', flush=True)\n"
        "with options.waits(): time.sleep(60)\n"
    )
    found = subprocess.run([sys.executable, "-c", run, str(BENCH)], capture_output=True, text=True, timeout=120)
    assert found.stdout == "goes on\n" and found.returncode == 1
    assert "Timeout" in found.stderr and 'File "<string>", line 7' in found.stderr
