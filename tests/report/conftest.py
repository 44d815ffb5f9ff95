"""Synthetic pages: every number below is invented to exercise the layout and says so on the page."""

import json
import math
import random

import numpy as np
import pytest

from glocal.report import (
    AdvicePage,
    BandPoint,
    Baseline,
    Column,
    Curve,
    CurvePoint,
    Estimate,
    Forecast,
    ForecastPoint,
    Headline,
    KeptMap,
    KernelTime,
    Pair,
    Picture,
    Strip,
    Table,
    TimeBar,
    matrix_png,
    sprite_sheet,
)

NOTICE = "Synthetic page for tests: every number on it is invented."


def moving_frames(seed: int, noise: float, count: int = 16, size: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    shift = np.random.default_rng(seed + 1000).normal(size=(size, size, 3))
    frames = []
    for t in range(count):
        cx, cy = 0.25 + 0.5 * t / count, 0.5 + 0.2 * math.sin(t / 3 + seed)
        disc = ((x - cx) ** 2 + (y - cy) ** 2 < 0.03)[..., None]
        ground = np.stack([0.3 + 0.3 * x, 0.35 + 0.25 * np.sin(9 * (x + t / 40)), 0.5 - 0.2 * y], axis=-1)
        frame = np.where(disc, np.array([0.92, 0.55, 0.2]), ground)
        frame = frame + noise * shift * (0.4 + disc) + 0.002 * rng.normal(size=frame.shape)
        frames.append((frame.clip(0, 1) * 255).astype(np.uint8))
    return frames


def make_strips() -> tuple[Strip, ...]:
    strips = []
    for role, sample, noise, caption in (
        ("worst", "s07", 0.10, "drift 0.11 · PSNR 24.1 dB · SSIM 0.88"),
        ("median", "s03", 0.05, "drift 0.06 · PSNR 28.3 dB · SSIM 0.93"),
        ("best", "s05", 0.02, "drift 0.03 · PSNR 33.9 dB · SSIM 0.97"),
        ("floor pair", "s03", 0.004, "dense against dense with another exact kernel"),
    ):
        seed = int(sample[1:])
        labels = ("dense", "dense, other kernel") if role == "floor pair" else ("dense", "sparse")
        dense, sparse = moving_frames(seed, 0.0), moving_frames(seed, noise)
        strips.append(Strip(role, sample, 16, sprite_sheet(dense), sprite_sheet(sparse), 64, 64, caption, 8.0, labels))
    return tuple(strips)


def make_curve() -> Curve:
    def point(label, kind, time, error, spread=0.12):
        return CurvePoint(
            label,
            kind,
            Estimate(time, time * 0.985, time * 1.015),
            Estimate(error, error * (1 - spread), error * (1 + spread)),
            n=2,
        )

    points = (
        point("allocation, 50 % kept", "chosen", 9.8, 0.086),
        point("allocation, 70 %", "allocation", 11.6, 0.041),
        point("allocation, 35 %", "allocation", 8.3, 0.21),
        point("neighborhood 5x9x9", "single", 9.9, 0.118),
        point("radial", "single", 11.2, 0.075),
        point("tile windows", "single", 8.6, 0.30),
        point("radial, published", "published", 10.9, 0.16),
        point("gna, published", "published", 9.4, 0.24),
        CurvePoint("dense", "dense", Estimate(15.1, 15.0, 15.25), Estimate(0.011)),
    )
    band = tuple(
        BandPoint(8 + 0.5 * i, *(scale * 0.5 * math.exp(-0.55 * (0.5 * i)) for scale in (0.75, 1.0, 1.35)))
        for i in range(10)
    )
    return Curve(points, floor=0.011, ceiling=1.18, limit=0.128, band=band, error_name="relative L2 of the latents")


def make_kept(layers: int, buckets: int) -> KeptMap:
    dice = random.Random(4)
    rows = []
    for layer in range(layers):
        row: list[float | None] = []
        for bucket in range(buckets):
            dense = bucket == 0 or layer in (0, layers - 1)
            row.append(None if dense else min(1.0, 0.2 + 0.6 * dice.random()))
        rows.append(tuple(row))
    names = ("σ 1.00–0.86", "σ 0.86–0.64", "σ 0.64–0.40", "σ 0.40–0.18", "σ 0.18–0.00")[:buckets]
    return KeptMap(tuple(str(i) for i in range(layers)), names, tuple(rows))


def make_sites(layers: int, heads: int) -> Table:
    dice = random.Random(9)
    columns = (
        Column("layer"),
        Column("head"),
        Column("steps"),
        Column("method"),
        Column("kept", percent=True),
        Column("mass kept", percent=True, digits=3),
        Column("error", "of residual"),
        Column("share of predicted error", percent=True),
    )
    rows = []
    for layer in range(layers):
        for head in range(heads):
            dense = dice.random() < 0.2
            rows.append(
                (
                    *(layer, head, "σ 0.86–0.00"),
                    *(("dense", 1.0, 1.0, 0.0, 0.0) if dense else ("neighborhood 5x9x9", 0.4, 0.93, 0.01, 0.004)),
                )
            )
    return Table(columns, tuple(rows))


def make_pairs(count: int) -> tuple[Pair, ...]:
    drifts = (0.055, 0.062, 0.048, 0.061, 0.071, 0.031, 0.058, 0.11)
    return tuple(
        Pair(
            f"s{i:02d}",
            15.1 + 0.03 * i,
            9.8 + 0.05 * (i % 3),
            0.011 + drifts[i] * 1.169,
            drifts[i],
            0.011,
            1.18,
            {"PSNR dB": 33 - 80 * drifts[i], "SSIM": 1 - drifts[i], "flicker": 0.0004 * (i - 3)},
        )
        for i in range(count)
    )


def make_page(layers: int = 8, buckets: int = 5, heads: int = 6, status: str = "validated", n: int = 8) -> AdvicePage:
    ladder = Table(
        (
            Column("recipe"),
            Column("kind"),
            Column("time", "s"),
            Column("speed-up", "×"),
            Column("error"),
            Column("why not"),
        ),
        (
            ("allocation, 50 % kept", "allocation", 9.8, 1.54, 0.086, "chosen"),
            ("allocation, 35 %", "allocation", 8.3, 1.82, 0.21, "drift above the limit"),
            ("allocation, 70 %", "allocation", 11.6, 1.30, 0.041, "slower than asked for"),
            ("neighborhood 5x9x9", "single", 9.9, 1.53, 0.118, "larger error at the same time"),
            ("radial, published", "published", 10.9, 1.39, None, "kernel gave NaN"),
        ),
    )
    mask = np.abs(np.subtract.outer(np.arange(64) // 8, np.arange(64) // 8)) <= 1
    pictures = (
        Picture("neighborhood 5x9x9, 40 % kept, layers 1 to 6", matrix_png(mask, cell=4), "A band along the diagonal"),
        Picture(
            "mass by block, layer 3 head 2",
            matrix_png(np.exp(-np.abs(np.subtract.outer(range(48), range(48))) / 9), cell=5),
            "Mass decays from the diagonal",
        ),
    )
    dice = random.Random(2)
    time_points = tuple(ForecastPoint(f"plan {i}", 2 + i, (2 + i) * dice.uniform(0.95, 1.05)) for i in range(9))
    error_points = tuple(
        ForecastPoint(f"rung {i}", 0.04 * 1.4**i, 0.04 * 1.4**i * dice.uniform(0.8, 1.25)) for i in range(7)
    )
    return AdvicePage(
        model="demo video transformer, 8 layers, 4,096 tokens",
        workload="24 prompts, 30 steps, no guidance",
        created="2026-01-01 12:00 UTC",
        notice=NOTICE,
        headline=Headline(
            status=status,  # type: ignore[arg-type]
            n=n,
            reason="Few pairs: treat the bounds with care." if status == "demonstration" else None,
            end_to_end=Estimate(1.54, 1.51, 1.57),
            step=Estimate(1.6, 1.58, 1.63),
            operator=Estimate(2.4, 2.31, 2.49),
            drift=Estimate(0.06, 0.04, 0.08),
            worst=0.11,
            worst_sample="s07",
            target=1.5,
            baseline=Baseline("cuDNN flash attention", 6.42),
            device="1 × NVIDIA H200, driver 575, torch 2.11",
            statement="A new sample from this workload exceeds the worst of 8 with probability at most 1/9 (11%).",
        ),
        reproduce="glocal advise demo --workload prompts.jsonl --target-speedup 1.5 --max drift=0.10 -o out",
        recipe_json=json.dumps({"schema": "glocal.recipe/1", "status": status}),
        curve=make_curve(),
        strips=make_strips(),
        kept=make_kept(layers, buckets),
        times=(
            TimeBar("dense", (("attention", 11.2), ("rest", 3.9))),
            TimeBar("sparse", (("attention", 4.7), ("reorder", 0.5), ("route", 0.3), ("planning", 0.1), ("rest", 4.2))),
        ),
        forecast=Forecast(time_points, error_points, 0.05, 1.3),
        left_dense=(
            "First step bucket (σ above 0.86): it carries 71 % of the error.",
            "Layers 0 and 7: sparse is slower than dense there.",
            "Cross attention and text queries: never touched.",
        ),
        valid_for=(
            ("canvases", "16 x 16 x 16"),
            ("steps", "20 to 50, flow matching"),
            ("weights", "220e2e46f5e0"),
            ("device", "NVIDIA H200"),
        ),
        refuted_by=(
            "One in nine new samples drifting beyond 0.11.",
            "A dense kernel 1.5 × faster than the baseline.",
            "Weights or adapters that differ from the hashes below.",
        ),
        sites=make_sites(layers, heads),
        pictures=pictures,
        pairs=make_pairs(n),
        ladder=ladder,
        kernels=tuple(
            KernelTime(name, "4,096 x 64, 6 heads, 40 % kept", m, 0.97 * m, 1.06 * m, 20)
            for name, m in (("cpu blocks", 14.2), ("flex", 19.9), ("dense", 33.0))
        ),
        versions={"glocal": "0.1.0", "torch": "2.11.0", "python": "3.12.3"},
        hashes={"weights": "9f" * 32, "validation samples": "3a" * 32},
        rows=tuple(
            {"stage": "validate", "sample": p.sample, "drift": p.drift, "note": "</script><b>"} for p in make_pairs(n)
        ),
    )


def make_dense_page() -> AdvicePage:
    return AdvicePage(
        model="demo video transformer, 8 layers, 4,096 tokens",
        workload="24 prompts, 30 steps, no guidance",
        created="2026-01-01 12:00 UTC",
        notice=NOTICE,
        headline=Headline(
            status="dense",
            n=0,
            reason="Attention is 21 % of the step, so no recipe can exceed 1.27× end to end, and 1.5× was asked for.",
            end_to_end=Estimate(1.06, 1.02, 1.10),
            step=Estimate(1.08, 1.05, 1.11),
            operator=Estimate(1.5, 1.44, 1.55),
            target=1.5,
            baseline=Baseline("torch SDPA", 33.0),
            device="2 CPU cores",
        ),
        reproduce="glocal advise demo -o out",
        curve=make_curve(),
        times=(TimeBar("dense", (("attention", 3.2), ("rest", 11.9))),),
        forecast=Forecast(
            time=tuple(ForecastPoint(f"plan {i}", 2.0 + i, 2.05 + i) for i in range(6)),
            time_spread=0.04,
            note="Error: ranks only, no number. The 90 % band of the prediction is wider than ×2.",
        ),
        left_dense=("Everything.",),
        refuted_by=("A step in which attention takes more than 45 %.",),
    )


@pytest.fixture(scope="session")
def advice_page() -> AdvicePage:
    return make_page()


@pytest.fixture(scope="session")
def large_page() -> AdvicePage:
    return make_page(layers=40, heads=40)


@pytest.fixture(scope="session")
def demonstration_page() -> AdvicePage:
    return make_page(status="demonstration", n=4)


@pytest.fixture(scope="session")
def dense_page() -> AdvicePage:
    return make_dense_page()
