"""glocal compare: checked before timed, tables and files whole or not at all, and what bad input is told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from glocal import cli
from glocal._errors import CheckFailed
from glocal.bench import compare as library
from glocal.bench.contenders import box, contenders, fit, parts
from glocal.bench.inputs import local_inputs, smooth_field
from glocal.canvas import Canvas, Layout
from glocal.patterns import Neighborhood, Pattern
from glocal.plan.build import plan

runner = CliRunner()
SMALL = ("--canvas", "4x6x8", "--heads", "2", "--head-dim", "16", "--rounds", "2")


def run(*words: str) -> tuple[int, str, str]:
    done = runner.invoke(cli.app, ["compare", *words])
    return done.exit_code, done.stdout, done.stderr


def test_every_pattern_runs_and_is_exact(tmp_path: Path) -> None:
    code, out, err = run(*SMALL, "-o", str(tmp_path / "out"), "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == {"dense, sdpa", "dense, glocal", *(c.name for c in contenders((4, 6, 8), 2))}
    assert all(row["skipped"] is None for row in rows.values())
    assert all(row["max_error"] <= record["tolerance"] for row in rows.values())
    assert all(row["seconds_low"] <= row["seconds"] <= row["seconds_high"] for row in rows.values())
    assert record["baseline"].startswith("dense, ")
    assert rows["causal"]["kept"] == pytest.approx((192 + 1) / (2 * 192))
    assert rows["frames"]["kept"] == pytest.approx(1 / 4)
    assert rows["frames"]["visited"] >= rows["frames"]["kept"]
    assert rows["dense, sdpa"]["error"] == pytest.approx(0.0, abs=1e-5)
    assert 0.01 < rows["neighborhood"]["error"] < 1.0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"index.html", "compare.csv", "compare.json"}
    with (tmp_path / "out" / "compare.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + len(rows)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "neighborhood, strided" in page
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == record["rows"]


def test_the_terminal_shows_the_selected_patterns_and_how_inputs_were_made() -> None:
    code, out, err = run(*SMALL, "--patterns", "windows; radial", "--quiet")
    assert (code, err) == (0, "")
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert {"windows", "radial", "dense, sdpa"} <= set(names)
    assert "grid" not in names
    assert "smooth field" in out
    assert "speed-up: over 'dense, " in out


def test_nothing_is_timed_or_written_when_a_pattern_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[object] = []
    monkeypatch.setattr(library, "compare_paired", lambda *a, **k: timed.append(a))
    monkeypatch.setattr(library, "_off", lambda *a: 1.0)
    code, out, err = run(*SMALL, "-o", str(tmp_path / "out"), "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("failed: dense, sdpa is off by 1.00e+00")
    assert "limit 0.0001. No times taken." in err
    assert timed == []
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = library.attend

    def slightly_off(q, k, v, pattern=None, **kwargs):  # type: ignore[no-untyped-def]
        done = real(q, k, v, pattern, **kwargs)
        done.out[..., 0] += 1e-3
        return done

    monkeypatch.setattr(library, "attend", slightly_off)
    spec = library.CompareSpec((4, 4), 1, 8, rounds=2)
    with pytest.raises(CheckFailed, match="windows is off by"):
        library.compare(spec, ["windows"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--canvas", "4xx8"), "--canvas '4xx8': expected positive integers joined by x"),
        ((*SMALL, "--patterns", "window"), "pattern 'window' is none of those for a canvas of 3 axes"),
        ((*SMALL, "--keep", "1.5"), "keep=1.5; legal: above 0 and at most 1"),
        ((*SMALL, "--dtype", "int8"), "dtype='int8' is unknown; legal: float32, float16, bfloat16; nearest: float"),
        ((*SMALL, "--device", "tpu"), "--device 'tpu' is not here; legal: cpu"),
        ((*SMALL, "--rounds", "1"), "rounds=1; legal: at least 2"),
        ((*SMALL, "--heads", "0"), "heads=0; legal: at least 1"),
        (("--train", "--mixers", "dinat", "--budget", "soon"), "--budget 'soon'"),
    ],
)
def test_bad_input(words: tuple[str, ...], message: str) -> None:
    code, out, err = run(*words, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


def test_an_output_that_is_a_file_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    code, _, err = run(*SMALL, "-o", str(tmp_path / "out"))
    assert code == 2
    assert "is a file; give a folder" in err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("shape", [(512,), (16, 16), (7, 9), (16, 16, 16), (5, 6, 7)])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 1.0])
def test_contenders_fit_any_canvas(shape: tuple[int, ...], keep: float) -> None:
    layout = Layout.of(Canvas(shape))
    for one in contenders(shape, 4, keep):
        if isinstance(one.method, Pattern):
            one.method.check(layout)
    local = contenders(shape, 4, keep)[0].method
    assert isinstance(local, Neighborhood)
    assert plan(local, layout).kept == pytest.approx(keep, rel=0.25)


def test_extents() -> None:
    assert fit((16, 16, 16), 0.25) == (10, 10, 10)
    assert fit((100,), 0.3) == (30,)
    assert fit((16, 16), 0.25, most=(2, 16)) == (2, 16)
    assert parts((16, 16, 16), 0.25) == (8, 8, 16)
    assert box((16, 2, 16)) == (4, 2, 8)


def test_inputs_are_local_and_repeat(generator: torch.Generator) -> None:
    field = smooth_field((16, 16), 64, generator)
    assert float(field.var()) == pytest.approx(1.0, rel=0.15)
    q, k, _ = local_inputs((16, 16), 2, 32, torch.Generator().manual_seed(3))
    again, _, _ = local_inputs((16, 16), 2, 32, torch.Generator().manual_seed(3))
    assert torch.equal(q, again)
    weights = (q @ k.mT / 32**0.5).softmax(-1)
    seen = Neighborhood(9).mask(Layout.of(Canvas((16, 16))))
    assert float((weights * seen).sum(-1).mean()) > 0.8  # 32 % of the keys hold most of the attention


def test_the_definition_is_masked_softmax(generator: torch.Generator) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4, generator=generator)
    seen = torch.rand(9, 9, generator=generator) < 0.5
    seen[4] = False
    got = library.masked_rows(q, k, v, torch.arange(9), lambda rows: seen[rows])
    want = scaled_dot_product_attention(*(t.double() for t in (q, k, v)), attn_mask=seen).nan_to_num(0.0)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--canvas", "8x8", "--mixers", "hilo"), "--mixers says nothing without --train; add it, or leave it out"),
        (("--train", "--canvas", "8x8"), "--canvas says nothing with --train; drop --train, or leave it out"),
        (("--canvas", "8x8", "--backend", "tritn"), "backend='tritn' is unknown; legal: auto, dense, cpu"),
    ],
)
def test_options_that_would_say_nothing_are_refused(words: tuple[str, ...], told: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "") and told in err


def test_a_canvas_of_one_tile() -> None:
    code, out, err = run("--canvas", "8x8", "--rounds", "2", "--patterns", "pooled top-k", "--quiet")
    assert (code, err) == (0, "") and "pooled top-k" in out
