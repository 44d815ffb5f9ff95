"""glocal advise on the command line: captured calls, bad usage, and the four outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from glocal.advise import Recipe
from glocal.advise.capture import CallInfo, CapturedCall, save_capture
from glocal.cli import app

RUNNER = CliRunner()


@pytest.fixture
def captured(tmp_path: Path, generator: torch.Generator) -> Path:
    """Two layers of one call each on a 4 x 8 x 8 canvas; attention is local, as queries and keys are alike nearby."""
    place = torch.cartesian_prod(*(torch.linspace(0, 1, n) for n in (4, 8, 8)))  # [N, 3]
    waves = torch.cat([(place @ torch.randn(3, 8, generator=generator) * 8).sin() for _ in range(2)], -1)
    calls = []
    for layer in range(2):
        q, k, v = (waves.expand(1, 2, -1, -1).contiguous() * s for s in (3.0, 3.0, 1.0))
        calls.append(CapturedCall(CallInfo(f"blocks.{layer}", (4, 8, 8), layer=layer), q, k, v))
    path = tmp_path / "calls.safetensors"
    save_capture(path, calls)
    return path


def test_captured_calls_give_operator_figures_only(captured: Path, tmp_path: Path) -> None:
    out = tmp_path / "advice"
    done = RUNNER.invoke(app, ["advise", str(captured), "-o", str(out), "--max", "relative_l2=10", "--json"])
    assert done.exit_code in (0, 1), done.output
    recipe = Recipe.load(out / "recipe.json")
    assert recipe.status in ("candidate", "dense")
    page = (out / "report.html").read_text()
    assert "nothing here is end to end" in page and "speed-up, operator" in page
    assert json.loads(done.stdout)["status"] == recipe.status


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["advise", "nothing"], "package.module:factory"),
        (["advise", "no_such_module:load"], "no_such_module"),
        (["advise", "missing.safetensors"], "does not exist"),
        (["advise", "demo", "--max", "drift"], "expected METRIC=V"),
        (["advise", "demo", "--effort", "heroic"], "quick"),
        (["advise", "demo", "--workload", "missing.jsonl"], "does not exist"),
    ],
)
def test_bad_usage_says_what_is_legal(words: list[str], text: str, tmp_path: Path) -> None:
    out = tmp_path / "advice"
    done = RUNNER.invoke(app, [*words, "-o", str(out)])
    assert done.exit_code == 2
    assert text in done.output
    assert not out.exists()
