"""The driver that trains the image models, at its smallest."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from glocal.models.generation import load_picture_model

DRIVER = Path(__file__).resolve().parents[2] / "bench" / "train_image.py"


def test_it_trains_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("train_image", DRIVER)
    assert spec is not None and spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    words = ["train_image", "--model", "dit", "--folder", str(tmp_path), "--batch", "2", "--pool", "4"]
    monkeypatch.setattr(sys, "argv", [*words, "--seconds", "0.5", "--samples", "1"])
    starts = []
    for _ in range(2):
        driver.main()
        starts.append(int(capsys.readouterr().out.split("from step ")[1].split(",")[0]))
    assert starts[0] == 0 and starts[1] >= 1
    assert (tmp_path / "samples_dit.png").read_bytes().startswith(b"\x89PNG")
    assert load_picture_model(tmp_path / "image_dit.safetensors").net.config.in_channels == 12
