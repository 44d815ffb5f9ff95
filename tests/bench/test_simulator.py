"""The driver bench/simulator.py, its table, and the page docs/simulate.md, whose every example must run."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from glocal import cli

ROOT = Path(__file__).resolve().parents[2]
DRIVER = runpy.run_path(str(ROOT / "bench" / "simulator.py"))
PAGE = (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8")


def figures(point) -> tuple[float, float]:
    return point.simulated, point.measured


def test_points_are_those_of_the_golden_file(golden: Callable[[str], Path]) -> None:
    published = json.loads(golden("gna/simulator.json").read_text())["published_points"]
    ours = [
        (c.model, *map(list, (c.canvas, c.window, p.stride, c.q_tile, c.kv_tile)), c.share, c.bound, *figures(p))
        for c in DRIVER["CASES"]
        for p in c.points
    ]
    names = ("model", "token_layout", "window", "stride", "q_tile", "kv_tile", "attention_share_of_e2e")
    columns = ("flop_wise", "simulator", "actual_b200")
    theirs = [(*(p[n] for n in names), *(p["published_e2e"][c] for c in columns)) for p in published]
    assert ours == theirs


def test_results_and_page_are_up_to_date() -> None:
    text = DRIVER["as_csv"](DRIVER["rows"]())
    assert (ROOT / "results" / "simulator.csv").read_text(encoding="utf-8") == text
    assert DRIVER["page_with"](DRIVER["as_markdown"](text)) == PAGE


def test_python_of_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "docs/simulate.md", "exec"), {})


def test_command_of_the_page_prints_what_the_page_shows() -> None:
    (block,) = re.findall(r"```console\n\$ (.*?)```", PAGE, flags=re.S)
    line, _, shown = block.replace("\\\n", " ").partition("\n")
    done = CliRunner().invoke(cli.app, shlex.split(line)[1:])
    assert done.exit_code == 0
    assert done.stdout == shown
