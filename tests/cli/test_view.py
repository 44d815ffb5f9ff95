"""glocal view: pictures of patterns, recipes, masks and plans."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from glocal import cli
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Phase, Recipe, Rule
from glocal.canvas import Canvas
from glocal.patterns import Neighborhood
from glocal.plan import PlanSpec, plan

runner = CliRunner()


def run(*words: str) -> tuple[int, str, str]:
    done = runner.invoke(cli.app, ["view", *words])
    return done.exit_code, done.stdout, done.stderr


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def view(tmp_path: Path, *words: str) -> list[dict]:
    code, out, err = run(*words, "-o", str(tmp_path / "out"), "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert sorted(r["file"] for r in rows) == sorted(str(p) for p in (tmp_path / "out").iterdir())
    for row in rows:
        size(Path(row["file"]))
    return rows


def test_a_pattern_on_a_canvas(tmp_path: Path) -> None:
    rows = view(tmp_path, "neighborhood", "--canvas", "4x8x8", "--query", "0x1x7")
    assert [Path(r["file"]).name for r in rows] == ["neighborhood.png", "neighborhood-blocks.png"]
    assert "query 0x1x7" in rows[0]["what"]
    assert rows[1]["kept"] == pytest.approx(0.25, rel=0.2)


def test_a_sequence(tmp_path: Path) -> None:
    assert len(view(tmp_path, "causal", "--canvas", "300")) == 2


def test_a_recipe(tmp_path: Path) -> None:
    methods = {
        "near": MethodSpec("windows", {"size": [{"fraction": 0.5}] * 3}, block=(16, 16)),
        "routed": MethodSpec("pooled_topk", {"keep": 0.25}, {"tile": [2, 2, 4]}, (16, 16), kind="route"),
    }
    rules = (
        Rule("near", ((0, 2),), heads=(0, 3), phase=Phase("sigma", 0.0, 0.5)),
        Rule("routed", ((3, 3),), heads="all"),
    )
    path = tmp_path / "recipe.json"
    Recipe("candidate", methods, rules, workload={"canvases": [{"shape": [4, 8, 8]}]}).save(path)
    rows = view(tmp_path, str(path))
    assert [Path(r["file"]).name for r in rows] == ["near.png", "rules.png"]
    assert rows[0]["kept"] == pytest.approx(1 / 8)
    assert "4 layers x 4 heads" in rows[1]["what"]
    assert size(tmp_path / "out" / "rules.png") == (96, 96)


def test_a_recipe_without_canvas_asks_for_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    Recipe("dense", {"near": MethodSpec("windows", {"size": [4]}, block=(16, 16))}).save(path)
    code, _, err = run(str(path))
    assert code == 2
    assert "names no canvas; give one with --canvas" in err
    assert len(view(tmp_path, str(path), "--canvas", "64")) == 1


def test_a_dense_recipe_has_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    Recipe("dense", {}).save(path)
    code, _, err = run(str(path))
    assert code == 2 and "has status 'dense' and no method: nothing to draw" in err


def test_masks_of_heads_and_large_ones(tmp_path: Path, generator: torch.Generator) -> None:
    path = tmp_path / "masks.safetensors"
    tensors = {
        "heads": torch.rand(3, 20, 30, generator=generator) < 0.3,
        "scores": torch.randn(8, 9, generator=generator, dtype=torch.float32).to(torch.bfloat16),
        "large": torch.ones(3000, 2500, dtype=torch.uint8),
        "line": torch.zeros(4),
    }
    save_file(tensors, path)
    rows = {Path(r["file"]).name: r for r in view(tmp_path, str(path))}
    assert set(rows) == {"heads-0.png", "heads-1.png", "heads-2.png", "scores.png", "large.png"}
    assert rows["heads-1.png"]["kept"] == pytest.approx(float(tensors["heads"][1].float().mean()))
    assert max(size(tmp_path / "out" / "large.png")) <= 1024


def test_a_plan(tmp_path: Path) -> None:
    made = plan(Neighborhood(9), Canvas((32, 32)), PlanSpec(64, 64))
    path = tmp_path / "plan.safetensors"
    save_file({name: t.contiguous() for name, t in made.tensors().items()}, path)
    (row,) = view(tmp_path, str(path))
    assert "16 query blocks x 16 key blocks" in row["what"]
    assert row["kept"] == pytest.approx(made.visited)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("neighborhood",), "pattern 'neighborhood' needs --canvas"),
        (("neighbour", "--canvas", "8x8"), "pattern 'neighbour' is none of those for a canvas of 2 axes"),
        (("pooled top-k", "--canvas", "8x8"), "'pooled top-k' looks at q and k"),
        (("causal", "--canvas", "8x8", "--query", "9x1"), "--query '9x1' lies outside the canvas; legal: 0..7x0..7"),
        (("causal", "--canvas", "8x8", "--query", "1"), "--query '1' is no place of the canvas"),
        (("none.json",), "recipe 'none.json' does not exist"),
        (("none.safetensors",), "FILE 'none.safetensors' does not exist"),
        (("clip.mp4",), "'clip.mp4': legal: a recipe.json, a .safetensors file, or a pattern's name"),
    ],
)
def test_bad_input(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, out, err = run(*words, "-o", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nonsense")
    assert "is no safetensors file" in run(str(bad))[2]
    save_file({"line": torch.zeros(3)}, bad)
    assert "holds no matrix: line (3,)" in run(str(bad))[2]
