from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from glocal.cli import app

CASE = "fna/na1d_dilated_rpb.safetensors"


def call(*args: object):
    return CliRunner().invoke(app, ["parity", "--quiet", *map(str, args)])


def test_passes_with_a_table_and_a_file(golden: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "parity.csv"
    done = call(golden(CASE), golden("gna/simulator.json"), "--backend", "all", "-o", out)
    assert done.exit_code == 0, done.output
    assert "na1d_dilated_rpb  reference" in done.stdout and "na1d_dilated_rpb  cpu" in done.stdout
    assert " 0 failed" in done.stdout
    rows = out.read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows].count("simulator") == 1 and len(rows) >= 3


def test_json_lists_every_tensor(golden: Callable[[str], Path]) -> None:
    (row,) = json.loads(call(golden(CASE), "--json").stdout)
    assert row["passed"] and row["backend"] == "auto"
    names = {c["name"] for c in row["compared"]}
    assert {"out.output", "out.logsumexp", "mid.attn_logits", "grad.rpb", "grad.key"} <= names


def test_a_failure_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "radial").mkdir()
    path = tmp_path / "radial" / "wrong.safetensors"
    config = '[{"num_frame": 2, "token_per_frame": 128, "block_size": 128, "decay_factor": 1.0, "model_type": "wan", '
    config += '"text_tokens": 0, "density": 0.5}]'
    mask = {"out.block_mask0": torch.tensor([[1, 0], [0, 0]], dtype=torch.uint8)}
    save_file(mask, str(path), metadata={"meta": f'{{"config": {config}}}'})
    done = call(path)
    assert done.exit_code == 1
    assert "FAILED: out.block_mask0: 75.000% of the entries differ" in done.stdout
    assert "failed: 1 of 1 cases: radial/wrong" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nowhere.safetensors",), "FILE 'nowhere.safetensors' does not exist"),
        (("--backend", "cpuu"), "no attention backend is called 'cpuu'; closest: cpu; legal: auto"),
        (("--device", "nowhere"), "device='nowhere' cannot be used here"),
    ],
)
def test_bad_usage_is_exit_code_2(golden: Callable[[str], Path], args: tuple[str, ...], words: str) -> None:
    done = call(*(args if len(args) == 1 else (golden(CASE), *args)))
    assert done.exit_code == 2
    assert words in done.stderr
