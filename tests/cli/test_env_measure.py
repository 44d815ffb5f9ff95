"""glocal env lists the backends; --measure checks and times them into a table that simulate finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from glocal import cli
from glocal.bench import calibrate
from glocal.kernels import registry

runner = CliRunner()
TINY = calibrate.Shape((8, 8), (4, 4), (4, 4), heads=1, head_dim=8)


def run(*words: str) -> tuple[int, str, str]:
    done = runner.invoke(cli.app, list(words))
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One tiny shape, and a home of one's own for tables."""
    monkeypatch.setitem(calibrate.SHAPES, "cpu", (TINY,))
    monkeypatch.setattr(calibrate, "user_tables", lambda: tmp_path / "tables")
    return tmp_path


def test_backends_are_listed_with_what_they_can() -> None:
    found = {b["name"]: b for b in json.loads(run("env", "--json")[1])["backends"]}
    assert list(found) == list(registry.names())
    assert found["reference"]["missing"]["cpu"] is None
    if not torch.cuda.is_available():
        assert found["reference"]["missing"]["cuda"] == "no cuda device"
    assert "float64" in found["reference"]["dtypes"]
    out = run("env")[1]
    assert "backend" in out
    for name in registry.names():
        assert f"\n{name} " in out


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.backends()
    broken = (registry.Backend(real[0].capability, lambda device: f"torch 9.9 for {device} is missing"), *real[1:])
    monkeypatch.setattr(registry, "backends", lambda: broken)
    assert "no: torch 9.9 for cpu is missing" in run("env")[1]


def test_measure_writes_a_table(small: Path) -> None:
    target = small / "mine.json"
    code, out, err = run("env", "--measure", "-o", str(target))
    assert code == 0
    assert "check backends" in err
    assert "time attention" in err
    assert f"written: {target}" in out
    table = json.loads(target.read_text())
    kinds = {(m["kernel"], m["kind"], m["direction"]) for m in table["measurements"]}
    assert ("dense", "dense", "forward") in kinds
    assert {k for _, k, _ in kinds} == {"dense", "full", "masked"}
    assert [p.name for p in small.iterdir()] == ["mine.json"]


def test_measure_as_json_and_where_it_goes(small: Path) -> None:
    code, out, err = run("env", "--measure", "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["path"] == str(small / "tables" / "cpu.json")
    assert record["table"]["name"] == "cpu"
    assert Path(record["path"]).is_file()


def test_nothing_is_written_when_a_backend_is_wrong(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "attention", lambda q, k, v, *a, **kw: torch.zeros_like(v))
    code, _, _ = run("env", "--measure", "-o", str(small / "mine.json"), "--quiet")
    assert code != 0
    assert list(small.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cpu"), "--device 'cpu' says nothing without --measure"),
        (("-o", "a.json"), "-o 'a.json' says nothing without --measure"),
        (("--measure", "--device", "tpu"), "--device 'tpu' is not here; legal: cpu"),
    ],
)
def test_bad_input(words: tuple[str, ...], message: str) -> None:
    code, out, err = run("env", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


def test_a_folder_as_output_is_refused_before_measuring(tmp_path: Path) -> None:
    code, _, err = run("env", "--measure", "-o", str(tmp_path))
    assert code == 2
    assert "is a folder; give a file" in err
