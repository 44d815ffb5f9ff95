"""What the probe costs inside real video transformers, and how well times of plans are forecast.

    python bench/advise_probe.py --model wan --device cuda        # Wan2.1-14B architecture, 81 frames at 720p
    python bench/advise_probe.py --model hunyuan --device cuda    # HunyuanVideo architecture, 129 frames at 720p
    python bench/advise_probe.py --model wan --tiny               # a dry run on a CPU

Weights are random and a few blocks stand for all of them (every block has one attention of the same size): rows say how
many ran and how many the model has. Before anything is timed, the model with the probe in it must give the bits of the
model without. Forecasts: every plan by a time model that is fitted to all the others. Rows of a model and half (probe,
forecast) take the place of older ones in the file; the others stay.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal._files import write_atomic
from glocal.adapt import attach
from glocal.adapt.attach import sites_of
from glocal.adapt.records import Core, SiteCall
from glocal.advise.dropped import Dropped
from glocal.advise.inside import ready_for
from glocal.advise.methods import MethodSpec, candidates, default_tile
from glocal.advise.modelled import forecast_of, known_plans
from glocal.advise.preflight import Inside
from glocal.advise.probe import Probe, ProbeSpec
from glocal.advise.timing import Checked, MethodTime, Ready, time_methods, timed_together
from glocal.plan.time_model import TimeSample, fit_time_model

Emit = Callable[[list[dict[str, object]]], None]
ROOT = Path(__file__).resolve().parent.parent
COLUMNS = [
    "model",
    "kind",
    "name",
    "tokens",
    "heads",
    "blocks_run",
    "blocks_model",
    "forecast_s",
    "measured_s",
    "error",
]
COLUMNS += ["extra_gib", "visited", "kernel", "device", "torch", "python"]


@dataclass(frozen=True)
class Case:
    """A model and the arguments of one forward."""

    model: Any
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    run: int
    of: int


def wan(device: str, tiny: bool, blocks: int) -> Case:
    """Wan2.1-14B: 21 x 45 x 80 tokens, 40 blocks of 40 heads."""
    import diffusers

    small: dict[str, Any] = {}
    if tiny:
        small = {"num_attention_heads": 2, "attention_head_dim": 64, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32}
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = diffusers.WanTransformer3DModel(**small, num_layers=blocks).eval()
        frames, height, width = (8, 24, 24) if tiny else (21, 90, 160)
        text = 16 if tiny else 4096
        arguments = {
            "hidden_states": torch.randn(1, 16, frames, height, width),
            "timestep": torch.tensor([900]),
            "encoder_hidden_states": torch.randn(1, 512 if not tiny else 5, text),
        }
        torch.set_default_dtype(torch.float32)
    return Case(model, arguments, (frames, height // 2, width // 2), blocks, 40)


def hunyuan(device: str, tiny: bool, blocks: int) -> Case:
    """HunyuanVideo: 33 x 45 x 80 tokens and 256 of text, 20 double and 40 single blocks of 24 heads."""
    import diffusers

    small: dict[str, Any] = {}
    if tiny:
        small = {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "rope_axes_dim": (16, 24, 24),
            "text_embed_dim": 16,
        }
        small |= {"pooled_projection_dim": 8, "num_refiner_layers": 1}
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = diffusers.HunyuanVideoTransformer3DModel(**small, num_layers=1, num_single_layers=blocks - 1).eval()
        frames, height, width = (8, 24, 24) if tiny else (33, 90, 160)
        words, text, pooled = (5, 16, 8) if tiny else (256, 4096, 768)
        arguments = {
            "hidden_states": torch.randn(1, 16, frames, height, width),
            "timestep": torch.tensor([900]),
            "encoder_hidden_states": torch.randn(1, words, text),
            "encoder_attention_mask": torch.ones(1, words, dtype=torch.long),
            "pooled_projections": torch.randn(1, pooled),
            "guidance": torch.tensor([6000.0]),
        }
        torch.set_default_dtype(torch.float32)
    return Case(model, arguments, (frames, height // 2, width // 2), blocks, 60)


LEAST = 16  # timed plans that make a forecast
MODELS: dict[str, Callable[[str, bool, int], Case]] = {"wan": wan, "hunyuan": hunyuan}


def plans(shape: tuple[int, ...], tile: tuple[int, ...]) -> list[MethodSpec]:
    """Windows of many densities along every axis: whole blocks (tiles) and partial ones (neighbourhoods)."""
    order, size = {"tile": list(tile)}, int(torch.tensor(tile).prod())
    found: list[MethodSpec] = []
    for fractions in [
        *[(f, 1.0, 1.0) for f in (0.15, 0.3, 0.5, 0.7)],
        *[(1.0, f, 1.0) for f in (0.15, 0.3, 0.5, 0.7)],
        *[(1.0, 1.0, f) for f in (0.15, 0.3, 0.5, 0.7)],
        *[(f, f, f) for f in (0.3, 0.45, 0.6, 0.75, 0.9)],
        *[(1.0, f, f) for f in (0.3, 0.5, 0.7, 0.85)],
    ]:
        window = [{"fraction": f} for f in fractions]
        found.append(MethodSpec("tile_windows", {"tile": list(tile), "window": window}, order, (size, size)))
    for fractions in [(f, f, f) for f in (0.4, 0.6, 0.8)] + [(1.0, f, f) for f in (0.3, 0.5, 0.7)]:
        window = [{"fraction": f} for f in fractions]
        found.append(MethodSpec("gna", {"window": window, "stride": list(tile)}, order, (size, size)))
        found.append(MethodSpec("gna", {"window": window}, order, (size, size)))
    stride = next(n for n in range(len(found) * 2 // 5, len(found)) if math.gcd(n, len(found)) == 1)
    return [found[number * stride % len(found)] for number in range(len(found))]  # the first ones are of all kinds


def seconds(run: Callable[[], object], cuda: bool, repeats: int) -> float:
    """Median over repeats, after one more."""
    taken = []
    for _ in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def peak(run: Callable[[], object], cuda: bool) -> float:
    """GiB above what is held when it begins; NaN on a CPU."""
    if not cuda:
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def batched(names: list[str], size: int) -> list[list[str]]:
    """The names in groups of `size`."""
    return [names[i : i + size] for i in range(0, len(names), size)]


def timing_row(row: dict[str, object], method: MethodSpec, time: MethodTime) -> dict[str, object]:
    """One timed call as a row."""
    kind = "dense call" if method.system == "dense" else "timed"
    values = {"measured_s": f"{time.median:.5f}", "visited": f"{time.visited:.4f}", "kernel": time.kernel}
    return {**row, "kind": kind, "name": "" if kind == "dense call" else method.words(), **values}


def write(rows: list[dict[str, object]], path: Path) -> None:
    """All rows, whole or not at all."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, table.getvalue())


def read(path: Path) -> list[dict[str, object]]:
    """All rows of a file."""
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def half(row: dict[str, object]) -> tuple[object, bool]:
    """The model of a row, and whether it says what the probe costs."""
    return row["model"], row["kind"] == "dense forward" or "probe" in str(row["kind"])


def replaced(rows: list[dict[str, object]], more: list[dict[str, object]]) -> list[dict[str, object]]:
    """`more` in place of older rows of the same model and half."""
    new = {half(row) for row in more}
    return sorted([row for row in rows if half(row) not in new] + more, key=lambda row: str(row["model"]), reverse=True)


@torch.no_grad()
def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), nargs="+", default=["wan"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--blocks", type=int, default=2, help="transformer blocks that run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plans", type=int, default=99, help=f"plans timed at most; no forecast under {LEAST}")
    parser.add_argument("--calls", action="store_true", help="forecast them also by plans of known block counts")
    parser.add_argument("--only", choices=["probe", "forecast"], help="one half of the rows")
    parser.add_argument("--take", type=Path, nargs="+", help="measure nothing: rows of these runs into --out")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "advise_probe.csv")
    options = parser.parse_args()
    rows = read(options.out) if options.out.exists() else []
    if options.take is not None:
        for path in options.take:
            rows = replaced(rows, read(path))
        write(rows, options.out)
        return
    for name in options.model:
        torch.manual_seed(0)
        case = MODELS[name](options.device, options.tiny, options.blocks)

        here: list[dict[str, object]] = []

        def emit(more: list[dict[str, object]], here: list[dict[str, object]] = here) -> None:
            if any(row["kind"] == "forecast" for row in more):  # they say what the rows before them said, and more
                here[:] = [row for row in here if row["kind"] not in ("timed", "forecast", "worst forecast")]
            here.extend(more)
            rows[:] = replaced(rows, here)
            write(rows, options.out)
            for row in more:
                if row["kind"] not in ("forecast", "timed", "forecast by known plans"):
                    print({k: v for k, v in row.items() if v != ""}, flush=True)

        measure(name, case, options, emit)
        del case


def measure(name: str, case: Case, options: argparse.Namespace, emit: Emit) -> None:
    """Rows of one model, handed to `emit` as they come."""
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else platform.processor()

    def forward() -> Tensor:
        return case.model(**case.arguments, return_dict=False)[0]

    grid = math.prod(case.shape)
    tail = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    row: dict[str, object] = {**dict.fromkeys(COLUMNS, ""), "model": name, "tokens": grid, **tail}
    row |= {"heads": case.model.config.num_attention_heads, "blocks_run": case.run, "blocks_model": case.of}
    if options.only != "probe":
        forecast_rows(case, forward, options, row, emit)
    if options.only != "forecast":
        probe_rows(case, forward, options, row, emit)


def probe_rows(
    case: Case, forward: Callable[[], Tensor], options: argparse.Namespace, row: dict[str, object], emit: Emit
) -> None:
    """What a probed forward takes beyond a dense one."""
    cuda = options.device.startswith("cuda")
    listed = {m.id: m for m in candidates(case.shape)}
    probe = Probe(ProbeSpec(listed, lambda step: 0, frozenset({0}), blocks=16))

    def probed() -> Tensor:
        with attach(case.model, probe):
            return forward()

    plain = forward()
    began = time.perf_counter()
    if not torch.equal(plain, probed()):
        raise SystemExit("the probe changed the model's output")
    planned = time.perf_counter() - began
    records = len(probe.records)
    dense_s, dense_gib = seconds(forward, cuda, options.repeats), peak(forward, cuda)
    probe_s, probe_gib = seconds(probed, cuda, options.repeats), peak(probed, cuda)
    added = (probe_s - dense_s) / case.run
    print(f"forward {dense_s:.3f} s, probed {probe_s:.3f} s ({case.run} blocks), first {planned:.1f} s", flush=True)
    emit(
        [
            {**row, "kind": "dense forward", "measured_s": f"{dense_s:.4f}", "extra_gib": f"{dense_gib:.3f}"},
            {**row, "kind": "probed forward", "measured_s": f"{probe_s:.4f}", "extra_gib": f"{probe_gib:.3f}"},
            {**row, "kind": "probe, one block", "name": f"{len(listed)} candidates", "measured_s": f"{added:.4f}"},
            {**row, "kind": "probe, whole model", "name": f"{records} records", "measured_s": f"{added * case.of:.3f}"},
            {**row, "kind": "probe over the dense peak", "extra_gib": f"{probe_gib - dense_gib:.3f}"},
        ]
    )


def forecast_rows(
    case: Case, forward: Callable[[], Tensor], options: argparse.Namespace, row: dict[str, object], emit: Emit
) -> None:
    """Plans timed inside a call of the model, and each of them forecast from the others."""
    site = next(s.name for s in sites_of(case.model) if s.kind != "cross")
    found: list[tuple[str, MethodTime, MethodSpec]] = []
    tried = {m.id: m for m in plans(case.shape, default_tile(case.shape))}
    chunks = batched(list(tried)[: options.plans], 4)
    every: dict[str, Ready] = {}

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> None:
        dropped = Dropped()
        for chunk in chunks:  # few at a time, each beside dense, so that a run that is cut keeps what it has
            ready = {n: ready_for(dropped, n, tried[n], (q, k, v, call)) for n in chunk}
            working = {n: r for n, r in ready.items() if r is not None}
            every.update(working)
            # The host's own kernel, and heads of several methods, cost dense calls each: with the first ones only.
            host = None if found else inner
            times = time_methods(q, k, v, call, working, rounds=options.rounds, inner=host)
            found.append(("dense", times.dense, MethodSpec("dense")))
            found.extend((n, t, tried[n]) for n, t in times.methods.items())
            emit([timing_row(row, method, t) for _, t, method in found[-1 - len(times.methods) :]])
            timed = [(t, method) for _, t, method in found if method.system != "dense" and t.median > 0]
            if len(timed) >= LEAST:
                samples = [TimeSample(t.full, t.partial, 0.0, t.median) for t, _ in timed]
                emit(forecasts([timing_row(row, method, t) for t, method in timed], samples))
        if options.calls:
            emit(by_known_plans((q, k, v, call), every, found, options.rounds, row))
        for n, why in dropped.why.items():
            print("dropped", tried[n].words(), why[:200], flush=True)

    with attach(case.model, Inside(site, look)):
        forward()


def by_known_plans(
    qkv: tuple[Tensor, Tensor, Tensor, SiteCall],
    every: dict[str, Ready],
    found: list[tuple[str, MethodTime, MethodSpec]],
    rounds: int,
    row: dict[str, object],
) -> list[dict[str, object]]:
    """Timed plans forecast as `glocal advise` does for many candidates: by a fit to plans of known block counts."""
    q, k, v, call = qkv
    groups, calls = known_plans(q, k, v, call, every)
    times = {n: t for n, t, _ in found}
    _, taken = timed_together(q, k, v, call, {}, calls, rounds=rounds, inner=None)
    out: list[dict[str, object]] = []
    for group in groups:
        model = group.model(taken, q.shape[1])
        held = [("check of known plans", c) for c in group.checks(model, taken, q.shape[1])]
        for n in group.names:
            forecast = forecast_of(model, every[n].plan, q.shape[1])
            held.append(("forecast by known plans", Checked(every[n].method.words(), forecast, times[n].median)))
        for kind, c in held:
            values = {"forecast_s": f"{c.forecast:.5f}", "measured_s": f"{c.measured:.5f}"}
            out.append({**row, "kind": kind, "name": c.name, **values, "error": f"{c.forecast / c.measured - 1:.4f}"})
    worst = max(abs(float(str(r["error"]))) for r in out)
    name = f"{len(out)} plans by {len(calls)} calls"
    return [*out, {**row, "kind": "worst by known plans", "name": name, "error": f"{worst:.4f}"}]


def forecasts(timed: list[dict[str, object]], samples: list[TimeSample]) -> list[dict[str, object]]:
    """Every plan forecast by a time model that is fitted to all the others."""
    out, errors = [], []
    for number, (row, sample) in enumerate(zip(timed, samples, strict=True)):
        model = fit_time_model([s for other, s in enumerate(samples) if other != number])
        forecast = model.seconds(sample.full_blocks, sample.partial_blocks)
        errors.append(abs(forecast / sample.seconds - 1))
        values = {"forecast_s": f"{forecast:.5f}", "error": f"{forecast / sample.seconds - 1:.4f}"}
        out.append({**row, "kind": "forecast", **values})
    last = {**timed[0], "kind": "worst forecast", "name": f"{len(errors)} plans", "error": f"{max(errors):.4f}"}
    return [*out, {**last, "visited": "", "kernel": "", "measured_s": ""}]


if __name__ == "__main__":
    main()
