"""The driver that trains the image models, at its smallest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from glocal.models.generation import load_picture_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model", ["unet", "dit"])
def test_it_trains_and_goes_on(model: str, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "bench" / "train_image.py"), "--model", model, "--folder", str(tmp_path)]
    words += ["--batch", "2", "--pool", "4", "--seconds", "1", "--samples", "1"]
    starts = []
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        starts.append(int(done.stdout.split("from step ")[1].split(",")[0]))
    assert starts[0] == 0 and starts[1] >= 1
    assert (tmp_path / f"samples_{model}.png").read_bytes().startswith(b"\x89PNG")
    assert load_picture_model(tmp_path / f"image_{model}.safetensors").net.config.in_channels == 12
