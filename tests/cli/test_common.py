"""Tables, JSON, extents and progress of the command line; files that appear whole."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from glocal._files import atomic_dir, write_atomic
from glocal._progress import NoProgress, Progress, TextProgress
from glocal.cli import _common
from glocal.cli._bars import RichProgress


@dataclass(frozen=True)
class Row:
    name: str
    global_: tuple[int, ...]
    error: float


def test_extents() -> None:
    assert _common.extents("30x48x80", "--canvas") == (30, 48, 80)
    assert _common.extents("7", "--window", axes=1) == (7,)
    with pytest.raises(ValueError, match=r"--canvas '30x4y8': expected positive integers joined by x, such as"):
        _common.extents("30x4y8", "--canvas")
    with pytest.raises(ValueError, match=r"--window '3x0'"):
        _common.extents("3x0", "--window")
    with pytest.raises(ValueError, match=r"--window '3x3' has 2 axes; expected 3"):
        _common.extents("3x3", "--window", axes=3)


def test_json_holds_records_and_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    _common.print_json({"rows": (Row("a", (1, 2), math.nan), Row("b", (), math.inf)), "path": Path("x")})
    assert json.loads(capsys.readouterr().out) == {
        "rows": [{"name": "a", "global": [1, 2], "error": None}, {"name": "b", "global": [], "error": None}],
        "path": "x",
    }


def test_plain_table_is_aligned_and_numbers_lie_right(capsys: pytest.CaptureFixture[str]) -> None:
    _common.print_table(("name", "error"), [("long name", 1.5), ("b", 0.00012345)], title="errors")
    assert capsys.readouterr().out.splitlines() == [
        "errors",
        "name           error",
        "long name        1.5",
        "b          0.0001234",
    ]


def test_terminal_table_keeps_brackets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _common.print_table(("name",), [("[bold]x",)])
    assert "[bold]x" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["none", "text", "rich"])
def test_every_progress_takes_the_same_calls(kind: str) -> None:
    out = io.StringIO()
    makers = {
        "none": NoProgress,
        "text": lambda: TextProgress(out),
        "rich": lambda: RichProgress(Console(file=out, force_terminal=True, width=100)),
    }
    bar: Progress = makers[kind]()
    bar.stage("probe", 2)
    bar.step()
    bar.step()
    bar.note("half-way [1]")
    bar.stage("search")
    bar.step()
    bar.close()
    bar.close()
    if kind != "none":
        assert "probe" in out.getvalue()
        assert "half-way [1]" in out.getvalue()
        assert "search" in out.getvalue()


def test_text_progress_says_when_a_stage_was_cut_short() -> None:
    out = io.StringIO()
    bar = TextProgress(out)
    bar.stage("probe", 4)
    bar.step(3)
    bar.close()
    assert out.getvalue().splitlines()[0] == "probe (4) ..."
    assert out.getvalue().rstrip().endswith("s, 3 of 4")


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    assert write_atomic(file, "one") == file
    write_atomic(file, b"two")
    assert file.read_text() == "two"
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]
    assert file.stat().st_mode & 0o400


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_atomic_dir_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out" / "demo"
    with pytest.raises(RuntimeError), atomic_dir(target) as work:
        (work / "a").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "out").iterdir()) == []

    with atomic_dir(target) as work:
        (work / "a").write_text("first")
        assert not target.exists()
    with atomic_dir(target) as work:
        (work / "b").write_text("second")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["demo"]


def test_atomic_dir_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"), atomic_dir(tmp_path / "a"):
        pass
