"""Token mixers side by side: examined, matched, trained, gone on with."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glocal.bench import mixer_suite
from glocal.bench.mixers import Entry, Frame, MixerSpec, compared, examine, mixers, task_of
from glocal.cli import app

pytest.importorskip("accelerate", reason="training needs accelerate")

MINE = """
from torch import nn

class Mine(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.layer = nn.Linear(dim, dim)

    def forward(self, x, stage=None):
        return self.layer(x - x.mean((1, 2), keepdim=True))

class Shrinks(Mine):
    def forward(self, x, stage=None):
        return self.layer(x)[:, :1]

class Mixes(Mine):
    def forward(self, x, stage=None):
        return self.layer(x - x.mean((0, 1, 2)))
"""
SMALL = Frame((16, 16, 32, 32), (1, 1, 1, 1), 8, 4.0)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def spec(**changes: object) -> MixerSpec:
    fields = {"steps": 2, "seeds": 2, "batch": 4, "precision": "no", "frame": SMALL}
    return MixerSpec(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_file_of_ones_own_is_as_good_as_a_name(mine: str, tmp_path: Path) -> None:
    task = task_of("classification", size=32, counts=(12, 8))
    found = mixers([f"{mine}:Mine", "hilo", f"{mine}:Shrinks", "no_such"], task, spec(), tmp_path / "out")
    by_name = {e.mixer.rsplit(":")[-1]: e for e in found}
    assert len(by_name["Mine"].scores) == len(by_name["hilo"].scores) == 2
    assert by_name["hilo"].params == pytest.approx(by_name["Mine"].params, rel=0.03)
    assert (
        "a mixer keeps the shape" in by_name["Shrinks"].reason and "unknown name 'no_such'" in by_name["no_such"].reason
    )
    assert [bool(e.reason) for e in found] == [False, False, True, True]
    done = sorted((tmp_path / "out").rglob("done.json"))
    assert len(done) == 4
    record = json.loads(done[0].read_text())
    done[0].write_text(json.dumps({**record, "score": 9.0}))  # a finished run is read, not repeated
    assert any(9.0 in e.scores for e in mixers([f"{mine}:Mine", "hilo"], task, spec(), tmp_path / "out"))


def test_samples_must_not_meet(mine: str) -> None:
    task = task_of("classification", size=32, counts=(8, 4))
    found = examine([f"{mine}:Mixes"], task, spec(match="none"))
    assert "a mixer treats samples alone" in found[f"{mine}:Mixes"].reason


@pytest.mark.parametrize("match", ["flops", "params"])
def test_entries_are_matched(match: str) -> None:
    task = task_of("classification", size=112, counts=(2, 2))
    frame = Frame((32, 32, 64, 64), (2, 2, 2, 2), 16, 4.0)
    found = examine(["davit", "hilo"], task, spec(match=match, frame=frame))
    name = {"flops": "macs", "params": "params"}[match]
    assert getattr(found["hilo"], name) == pytest.approx(getattr(found["davit"], name), rel=0.03)
    assert found["hilo"].mlp_ratio != 4.0


def test_differences_are_paired_by_seed() -> None:
    rows = [Entry("a", scores=(0.9, 0.8, 0.7)), Entry("b", scores=(0.8, 0.7, 0.6)), Entry("c", reason="none")]
    mean, low, high = compared(rows, "a")["b"]
    assert mean == pytest.approx(-0.1) and low == pytest.approx(high)


def test_the_verb(mine: str, tmp_path: Path) -> None:
    base = ["compare", "--train", "--mixers", f"{mine}:Mine,hilo", "--steps", "2", "--seeds", "2", "--size", "32"]
    out = tmp_path / "page"
    done = CliRunner().invoke(app, [*base, "--batch", "4", "--samples", "12", "--quiet", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "paired by seed" in done.output and (out / "mixers.csv").is_file()
    assert (out / "mixers.svg").read_text().startswith("<svg")


def test_the_suite(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("SPEC", spec()), ("SIZE", 32), ("COUNTS", (12, 8))):
        monkeypatch.setattr(mixer_suite, name, value)
    base = ["bench", "mixers", "--device", "cpu", "--case", f"{mine}:Mine", "--case", "hilo", "--quiet"]
    done = CliRunner().invoke(app, [*base, "-o", "rows.csv"])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [Path(r["mixer"]).name for r in rows if r["scores"].count(" ") == 1 and float(r["images_s"]) > 0] != []
    assert {Path(r["mixer"]).name for r in rows} == {"mine.py:Mine", "hilo"} and rows[0]["to_best"] == "0.0000"
    assert float(rows[0]["mean"]) >= float(rows[1]["mean"])
    failing = CliRunner().invoke(app, [*base, "--case", f"{mine}:Shrinks"])
    assert failing.exit_code == 1 and "a mixer keeps the shape" in failing.output


def test_bad_settings_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="task='depth' is unknown; legal: classification, segmentation"):
        task_of("depth")
    with pytest.raises(ValueError, match="match='cost' is unknown; legal: none, params, flops, latency"):
        spec(match="cost")
    with pytest.raises(ValueError, match="steps=None needs a budget"):
        spec(steps=None)
