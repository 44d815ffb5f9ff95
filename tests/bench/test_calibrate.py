"""Device tables measured here: shapes that allow whole blocks, rows that give rates, and a check before any timing."""

from __future__ import annotations

import math

import pytest
import torch

from glocal.bench import calibrate
from glocal.bench.calibrate import SHAPES, Calibration, Shape, measure_device, save_table
from glocal.plan.cost import device_names, device_table, forecast
from glocal.plan.simulate import AxisWindow, simulate

TINY = Shape((16, 16), (12, 12), (4, 4), heads=1, head_dim=8)
QUICK = Calibration(backends=("reference",), shapes=(TINY,), warmup=0, repeats=1, copy_bytes=1 << 12)


@pytest.mark.parametrize("shape", [shape for shapes in SHAPES.values() for shape in shapes])
def test_every_shape_has_whole_and_masked_blocks(shape: Shape) -> None:
    stride = calibrate._aligned(shape)
    aligned = [AxisWindow(k, s) for k, s in zip(shape.window, stride, strict=True)]
    assert simulate(shape.canvas, aligned, shape.tile, shape.tile).partial_blocks == 0
    fine = simulate(shape.canvas, [AxisWindow(k) for k in shape.window], shape.tile, shape.tile)
    assert fine.partial_blocks and fine.full_blocks


def test_a_table_is_measured_saved_and_used(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = measure_device("cpu", QUICK)
    assert [(m.kernel, m.kind, m.direction) for m in table.measurements] == [
        (kernel, kind, direction)
        for kernel, kind in (("dense", "dense"), ("reference", "full"), ("reference", "masked"))
        for direction in ("forward", "backward")
    ]
    assert table.launch_seconds is not None and table.launch_seconds > 0 and table.copy_bytes_per_second > 0
    assert save_table(table) == tmp_path / "glocal" / "devices" / "cpu.json"
    assert "cpu" in device_names() and device_table("cpu") == table
    elsewhere = save_table(table, tmp_path / "mine.json")
    assert device_table(str(elsewhere)) == table
    work = simulate((16, 16), [AxisWindow(12), AxisWindow(12)], (4, 4), (4, 4))
    for direction in ("forward", "backward"):
        guess = forecast(work, 1, 8, "cpu", dtype="float32", direction=direction)
        assert math.isfinite(guess.seconds) and guess.seconds > 0 and guess.kernel == "reference"


def test_a_backend_that_is_wrong_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "attention", lambda q, k, v, plan, backend: torch.zeros_like(q))
    with pytest.raises(RuntimeError, match=r"backend 'reference' is off by 1\.00e\+00 .* limit 0\.0001"):
        measure_device("cpu", QUICK)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device='meta' cannot be calibrated; legal: cpu, cuda; nearest: cpu"):
        measure_device("meta")
    with pytest.raises(ValueError, match="dtype=torch.float64 cannot be calibrated; legal: float32, float16, bfloat16"):
        measure_device("cpu", Calibration(dtype=torch.float64))


def test_a_shape_without_whole_blocks_is_refused() -> None:
    spec = Calibration(backends=("reference",), shapes=(Shape((16,), (7,), (4,), 1, 8),), warmup=0, repeats=1)
    with pytest.raises(ValueError, match="no perfectly block-sparse stride"):
        measure_device("cpu", spec)
