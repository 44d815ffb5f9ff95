"""Device tables, forecasts and the fitted time model."""

import json
import math
import random
from dataclasses import replace

import pytest

from glocal.patterns.axis import AxisWindow
from glocal.plan.cost import (
    BlockWork,
    DeviceTable,
    Measurement,
    TimeModel,
    TimeSample,
    device_names,
    device_table,
    fit_time_model,
    forecast,
    imbalance,
    load_table,
    user_tables,
)
from glocal.plan.devices.table import Kind
from glocal.plan.simulate import simulate

VIDEO = (30, 48, 80)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def video(stride):
    axes = [AxisWindow(k, s) for k, s in zip((18, 24, 24), stride)]
    return simulate(VIDEO, axes, (2, 8, 8), (2, 8, 8))


def toy(**changes):
    """One kernel: dense 1 TFLOP/s, whole blocks 0.5 TFLOP/s, masked blocks 0.25 TFLOP/s; head size 64."""
    flops = 4 * 1024**2 * 64
    axes = [AxisWindow(256)]
    counts = simulate((1024,), axes, (64,), (64,))
    block = 4 * 64 * 64 * 64
    masked = counts.full_blocks * block / 0.5e12 + counts.partial_blocks * block / 0.25e12
    base = {"direction": "forward", "dtype": "float32", "heads": 1, "head_dim": 64, "canvas": (1024,)}
    rows = (
        Measurement("k", "dense", milliseconds=flops / 1e12 * 1e3, **base),
        Measurement("k", "full", milliseconds=flops / 4 / 0.5e12 * 1e3, window=(256,), **base),
        Measurement(
            "k", "masked", milliseconds=masked * 1e3, window=(256,), stride=(1,), q_tile=(64,), kv_tile=(64,), **base
        ),
    )
    fields = {
        "name": "toy", "title": "Toy", "date": "2026-01-01", "source": "made up for a test", "processors": 4,
        "copy_bytes_per_second": 1e9, "launch_seconds": 1e-5, "measurements": rows,
    }  # fmt: skip
    return DeviceTable(**{**fields, **changes})


def test_rates_follow_from_measured_seconds():
    table = toy()
    expected_rates: dict[Kind, float] = {"dense": 1e12, "full": 0.5e12, "masked": 0.25e12}
    for kind, expected in expected_rates.items():
        (rate,) = table.rates(kind, "forward", 64, 1024, "float32")
        assert rate.flops_per_second == pytest.approx(expected)
    assert table.rates("dense", "backward", 64, 1024, "float32") == ()
    with pytest.raises(ValueError, match="dtype='bfloat16' was not measured on toy; legal: float32; nearest: float32"):
        table.rates("dense", "forward", 64, 1024)


def test_noise_never_makes_a_mask_cheaper_than_none():
    table = toy()
    dense, full, masked = table.measurements
    quick = toy(measurements=(dense, full, replace(masked, milliseconds=1e-6)))
    assert quick.rates("masked", "forward", 64, 1024, "float32")[0].flops_per_second == pytest.approx(0.5e12)


def test_h200_table_gives_the_published_rates():
    """TFLOP/s on the 115,200-token shape, 8 heads of 128."""
    table = device_table("H200")
    rates = {(k, d): {r.kernel: r.flops_per_second / 1e12 for r in table.rates(k, d, 128, 115200)}
             for k in ("dense", "full") for d in ("forward", "backward")}  # fmt: skip
    assert rates["dense", "forward"] == pytest.approx({"fa4": 694, "cudnn": 630, "fa2": 357}, rel=0.005)
    assert rates["dense", "backward"] == pytest.approx({"fa4": 640, "cudnn": 554}, rel=0.005)
    assert rates["full", "forward"] == pytest.approx({"fa4": 688, "cudnn": 634, "natten": 592, "flex": 421}, rel=0.005)
    assert rates["full", "backward"]["fa4"] == pytest.approx(584, rel=0.005)


def test_forecast_meets_the_measurements_it_comes_from():
    """The terms are right when the call's own time comes back: 78.3 ms dense, 7.11 ms aligned, 25.7 ms stride 1."""
    aligned = forecast(video((18, 8, 8)), 8, 128, "h200")
    assert aligned.dense_seconds * 1e3 == pytest.approx(78.3, rel=1e-6)
    assert (aligned.full + aligned.partial) * 1e3 == pytest.approx(7.11, rel=1e-6)
    assert (aligned.kernel, aligned.dense_kernel) == ("fa4", "fa4")
    assert aligned.reorder * 1e3 == pytest.approx(0.35 * 4 / 3, rel=0.01)  # q, k, v took 0.35 ms; here out comes too
    fine = forecast(video((1, 1, 1)), 8, 128, "h200", reorder=False)
    assert (fine.kernel, fine.reorder) == ("natten", 0)
    assert (fine.full + fine.partial) * 1e3 == pytest.approx(25.7, rel=1e-6)
    assert any("launch overhead was not measured" in note for note in fine.notes)


def test_forecast_adds_its_terms():
    work = BlockWork(
        tokens=640, kv_tokens=640, block_pairs=4096, full_blocks=30, partial_blocks=10, visible_pairs=140000
    )
    result = forecast(work, 2, 64, toy(), dtype="float32", routing_seconds=3e-4)
    block = 4 * 4096 * 64 * 2
    assert result.full == pytest.approx(30 * block / 0.5e12)
    assert result.partial == pytest.approx(10 * block / 0.25e12)
    assert result.launch == 1e-5 and result.routing == 3e-4 and result.imbalance == 0
    assert result.reorder == pytest.approx(2 * 4 * 640 * 2 * 64 * 4 / 1e9)
    assert result.seconds == pytest.approx(
        result.full + result.partial + result.launch + result.routing + result.reorder
    )
    assert result.dense_seconds == pytest.approx(1e-5 + 4 * 640 * 640 * 64 * 2 / 1e12)
    assert result.speedup == pytest.approx(result.dense_seconds / result.seconds)
    assert "row lengths unknown: imbalance counts as 0" in result.notes
    json.dumps(result.as_dict())


def test_forecast_says_when_a_head_size_is_borrowed():
    result = forecast(video((18, 8, 8)), 8, 96, "h200")
    assert "head_dim=96 was not measured; rates are those of 128" in result.notes


def test_forecast_says_when_blocks_are_smaller_than_measured():
    small = simulate((64, 64), [AxisWindow(24, 8)] * 2, (8, 8), (8, 8))
    notes = forecast(small, 8, 128, "h200").notes
    assert any(note.startswith("blocks of 4,096 pairs are smaller than any measured (16,384)") for note in notes)
    assert not any("smaller than any measured" in note for note in forecast(video((18, 8, 8)), 8, 128, "h200").notes)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device": "h20"}, r"device='h20' has no table; legal: h100, h200, or a \.json file .*; nearest: h200"),
        ({"device": "nowhere.json"}, r"device='nowhere\.json': no such file; write one with `glocal env --measure`"),
        ({"dtype": "fp16"}, r"dtype='fp16' is unknown; legal: float16, bfloat16, float32; nearest: float16"),
        ({"dtype": "float32"}, r"dtype='float32' was not measured on h200; legal: bfloat16; nearest: bfloat16"),
        ({"heads": 0}, r"heads=0; legal: at least 1; nearest: 1"),
        ({"head_dim": 0}, r"head_dim=0; legal: at least 1; nearest: 1"),
    ],
)
def test_bad_arguments_are_told_back(kwargs, message):
    call = {"work": video((18, 8, 8)), "heads": 8, "head_dim": 128, "device": "h200", **kwargs}
    with pytest.raises(ValueError, match=message):
        forecast(**call)


def test_missing_rows_are_errors():
    table = toy()
    rows = table.measurements
    fine = simulate((1024,), [AxisWindow(256)], (64,), (64,))
    with pytest.raises(
        ValueError, match=r"device='toy' has no forward row with masked blocks .* perfectly block sparse"
    ):
        forecast(fine, 1, 64, toy(measurements=rows[:2]), dtype="float32")
    with pytest.raises(ValueError, match="k has masked rows but no full rows"):
        forecast(fine, 1, 64, toy(measurements=(rows[0], rows[2])), dtype="float32")
    with pytest.raises(ValueError, match="device='toy' has no dense backward row"):
        forecast(fine, 1, 64, table, dtype="float32", direction="backward")


def test_tables_travel_through_files(tmp_path):
    table = toy()
    path = tmp_path / "toy.json"
    path.write_text(table.to_json())
    assert load_table(path) == table == device_table(str(path))
    user_tables().mkdir(parents=True)
    (user_tables() / "mine.json").write_text(table.to_json())
    assert device_names() == ("h100", "h200", "mine") and device_table("mine") == table
    for text, message in (
        ("{", "not JSON"),
        ("[]", "schema=None; legal: 'glocal.device/1'"),
        ('{"schema": "glocal.device/0"}', "schema='glocal.device/0'"),
        ('{"schema": "glocal.device/1", "measurements": [], "colour": 1}', "colour"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_table(path)


def test_every_shipped_table_states_its_source():
    for name in device_names():
        table = device_table(name)
        assert table.name == name and table.source and len(table.date) == len("2026-11-22")
        for kind in ("dense", "full", "masked"):
            assert table.rates(kind, "forward", 128, 65536)


@pytest.mark.parametrize(
    ("rows", "processors", "expected"),
    [([4, 4, 4, 4], 2, 0.0), ([4, 1, 1], 2, 1 / 3), ([5], 4, 3.0), ([], 3, 0.0), ([1, 1, 4], 2, 5 * 2 / 6 - 1)],
)
def test_imbalance_is_the_wait_for_the_last(rows, processors, expected):
    assert imbalance(rows, processors) == pytest.approx(expected)


def test_imbalance_needs_a_processor():
    with pytest.raises(ValueError, match="processors=0; legal: at least 1; nearest: 1"):
        imbalance([1], 0)


def timed(model, count, noise=0.0, seed=0):
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        full, partial, uneven = rng.randint(0, 4000), rng.randint(0, 2000), rng.random() * 40
        seconds = model.seconds(full, partial, uneven) * (1 + noise * (2 * rng.random() - 1))
        samples.append(TimeSample(full, partial, uneven, seconds))
    return samples


def test_time_model_recovers_its_coefficients():
    truth = TimeModel(2e-5, 3e-7, 5e-7, 1e-6, 0.0, None)
    model = fit_time_model(timed(truth, 12), timed(truth, 6, seed=1))
    assert (model.t0, model.full, model.partial, model.uneven) == pytest.approx((2e-5, 3e-7, 5e-7, 1e-6), rel=1e-6)
    assert model.fit_error < 1e-9 and model.check_error is not None and model.check_error < 1e-6 and model.trusted


def test_time_model_never_goes_negative():
    """Time falls with imbalance here: an unbounded fit would give it a negative price."""
    samples = [
        TimeSample(n, p, 50 - n / 100, 1e-5 + 1e-7 * n + 1e-7 * p) for n in range(0, 4000, 500) for p in (0, 900)
    ]
    bent = [TimeSample(s.full_blocks, s.partial_blocks, s.imbalance, s.seconds - 5e-8 * s.imbalance) for s in samples]
    model = fit_time_model(bent)
    assert min(model.t0, model.full, model.partial, model.uneven) >= 0


def test_time_model_is_the_best_non_negative_fit():
    """No small step from the solution that stays non-negative lowers the squared relative error."""
    truth = TimeModel(0.0, 3e-7, 0.0, 1e-6, 0.0, None)
    samples = timed(truth, 20, noise=0.2)
    model = fit_time_model(samples)

    def loss(t0, full, partial, uneven):
        other = TimeModel(t0, full, partial, uneven, 0.0, None)
        return sum((other.seconds(s.full_blocks, s.partial_blocks, s.imbalance) / s.seconds - 1) ** 2 for s in samples)

    at = [model.t0, model.full, model.partial, model.uneven]
    for index, step in enumerate((1e-6, 1e-9, 1e-9, 1e-8)):
        for sign in (1, -1):
            near = list(at)
            near[index] = max(near[index] + sign * step, 0.0)
            assert loss(*near) >= loss(*at) - 1e-12


def test_time_model_is_trusted_only_when_held_out_samples_agree():
    truth = TimeModel(2e-5, 3e-7, 5e-7, 0.0, 0.0, None)
    samples = timed(truth, 12)
    assert not fit_time_model(samples).trusted  # nothing checked
    off = [TimeSample(s.full_blocks, s.partial_blocks, s.imbalance, 1.2 * s.seconds) for s in timed(truth, 6, seed=1)]
    model = fit_time_model(samples, off)
    assert not model.trusted and model.check_error == pytest.approx(1 - 1 / 1.2, rel=1e-3)


def test_time_model_refuses_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="3 samples for 4 coefficients; legal: at least 4; nearest: 4"):
        fit_time_model([TimeSample(1, 1, 1, 1.0)] * 3)
    with pytest.raises(ValueError, match=r"seconds=0\.0 in a timed sample; legal: above 0"):
        fit_time_model([TimeSample(1, 1, 1, 0.0)] * 4)
    assert math.isfinite(fit_time_model([TimeSample(1, 0, 0, 1.0)] * 4).fit_error)
