"""The driver of the built-in model, at its smallest budget: weights that load and a loss curve with its hardware."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch

from glocal.models.generation import load_weights

DRIVER = Path(__file__).resolve().parents[2] / "bench" / "train_demo.py"


def test_tiny_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights, curve = tmp_path / "w.safetensors", tmp_path / "curve.csv"
    options = ["--preset", "tiny", "--no-compile", "--folder", str(tmp_path / "state")]
    options += ["--weights", str(weights), "--curve", str(curve), "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", [str(DRIVER), *options])
    runpy.run_path(str(DRIVER), run_name="__main__")
    rows = list(csv.DictReader(curve.open()))
    assert rows[-1]["step"] == "4" and rows[-1]["torch"] == torch.__version__ and rows[-1]["device"]
    model = load_weights(weights)
    assert model.condition(shape="disc").sum() == 1
    before = weights.read_bytes()
    runpy.run_path(str(DRIVER), run_name="__main__")  # finished: nothing is trained further
    assert weights.read_bytes() == before
