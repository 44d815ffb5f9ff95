"""glocal compare: every pattern side by side with dense attention on this device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glocal.cli._common import (
    Json,
    Quiet,
    check_folder,
    check_idle,
    extents,
    print_fields,
    print_json,
    print_table,
    progress,
)
from glocal.cli._machine import facts, torch_device

if TYPE_CHECKING:
    from glocal.bench.compare import Comparison, Row
    from glocal.report import Picture, Table


OF_TRAINING = ("task", "mixers", "match", "budget", "steps", "seeds", "size", "data", "batch", "samples")
OF_PATTERNS = ("canvas", "heads", "head_dim", "dtype", "patterns", "keep", "rounds", "seed", "backend")


def command(
    ctx: typer.Context,
    canvas: Annotated[str | None, typer.Option(help="Tokens per axis, such as 16x16x16.")] = None,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    patterns: Annotated[str | None, typer.Option(help="Names joined by semicolons (default: all).")] = None,
    keep: Annotated[float, typer.Option(help="Share of pairs that windows are made for.")] = 0.25,
    rounds: Annotated[int, typer.Option(help="Timed rounds, every pattern once in each.")] = 9,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    backend: Annotated[str, typer.Option(help="Backend of the patterns: auto, or a name from `glocal env`.")] = "auto",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for page, CSV and JSON.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train token mixers instead of timing patterns.")] = False,
    task: Annotated[str, typer.Option(help="Of --train: classification or segmentation.")] = "classification",
    mixers: Annotated[str | None, typer.Option(help="Of --train: names, or my.py:Mine, joined by commas.")] = None,
    match: Annotated[str, typer.Option(help="Of --train: none, params, flops or latency.")] = "params",
    budget: Annotated[str | None, typer.Option(help="Of --train: time for all runs, such as 30m or 10h.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of --train: updates a run, instead of a budget.")] = None,
    seeds: Annotated[int, typer.Option(help="Of --train: runs of every mixer.")] = 3,
    size: Annotated[int | None, typer.Option(help="Of --train: px a side.")] = None,
    data: Annotated[Path | None, typer.Option(help="Of --train: folder with train/CLASS and test/CLASS.")] = None,
    batch: Annotated[int, typer.Option(help="Of --train: images an update.")] = 64,
    samples: Annotated[int, typer.Option(help="Of --train: scenes to learn from, without --data.")] = 20_000,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure patterns side by side, or train token mixers.

    Time, memory and error of every pattern beside dense attention on this device; exit code 1 if one is not exact.
    """
    if train:
        from glocal.cli import _compare_train

        check_idle(ctx, OF_PATTERNS, "with --train; drop --train")
        given = locals()
        options = {name: given[name] for name in (*OF_TRAINING, "out", "quiet", "json")}
        _compare_train.run({**options, "device": torch_device(device)})
        return
    check_idle(ctx, OF_TRAINING, "without --train; add it")
    if canvas is None:
        raise ValueError("compare needs --canvas, such as --canvas 16x16x16, or --train")
    from glocal.bench.compare import CompareSpec, compare

    spec = CompareSpec(
        shape=extents(canvas, "--canvas"),
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch_device(device),
        keep=keep,
        rounds=rounds,
        seed=seed,
        backend=backend,
    )
    check_folder(out)
    names = None if patterns is None else [name.strip() for name in patterns.split(";")]
    bar = progress(quiet or json)
    try:
        found = compare(spec, names, bar)
    finally:
        bar.close()
    known = facts(spec.device)
    if out is not None:
        _write(found, known, out)
    if json:
        print_json({"facts": known, **_record(found)})
        return
    _print(found, known)
    if out is not None:
        print(f"\nwritten: {out / 'index.html'}, compare.csv, compare.json")


def _print(found: Comparison, known: dict[str, str]) -> None:
    spec = found.spec
    print_fields({**known, **_shape(found)})
    print()
    columns = ("pattern", "kept %", "visited %", "ms", "5-95 %", "speed-up", "MiB", "error", "exact to", "backend")
    print_table(columns, [_cells(row) for row in found.rows if row.skipped is None])
    print()
    for row in found.rows:
        if row.skipped is not None:
            print(f"{row.name} did not run: {row.skipped}")
    print(f"speed-up: over {found.baseline!r}, the fastest dense kernel here, median of {spec.rounds} paired rounds.")
    print("error: relative distance to dense attention on these inputs; other inputs give other errors.")


def _shape(found: Comparison) -> dict[str, str]:
    spec = found.spec
    tokens = 1
    for n in spec.shape:
        tokens *= n
    return {
        "canvas": f"{'x'.join(map(str, spec.shape))} ({tokens:,} tokens)",
        "heads": f"{spec.heads} of {spec.head_dim}, {spec.dtype}",
        "inputs": f"{found.inputs}; seed {spec.seed}",
        "exact": f"{found.checked_rows} rows of every pattern against its definition in float64, all within "
        f"{found.tolerance:g} of the largest value",
    }


def _cells(row: Row) -> tuple[Any, ...]:
    time = row.time
    assert time is not None
    return (
        row.name,
        None if row.kept is None else round(100 * row.kept, 1),
        None if row.visited is None else round(100 * row.visited, 1),
        time.median * 1e3,
        f"{time.low * 1e3:.4g} - {time.high * 1e3:.4g}",
        1.0 if row.speedup is None else row.speedup.median,
        None if row.memory is None else row.memory / 2**20,
        row.error,
        f"{row.max_error:.0e}",
        row.backend,
    )


def _record(found: Comparison) -> dict[str, Any]:
    rows = []
    for row in found.rows:
        flat = {name: value for name, value in vars(row).items() if name not in ("time", "speedup")}
        if row.time is not None:
            flat |= {"seconds": row.time.median, "seconds_low": row.time.low, "seconds_high": row.time.high}
            flat["seconds_samples"] = row.time.samples
        if row.speedup is not None:
            ratio = row.speedup
            flat |= {"speedup": ratio.median, "speedup_low": ratio.low, "speedup_high": ratio.high}
            flat["speedup_level"] = ratio.level
        rows.append(flat)
    return {
        "spec": found.spec,
        "baseline": found.baseline,
        "tolerance": found.tolerance,
        "checked_rows": found.checked_rows,
        "inputs": found.inputs,
        "rows": rows,
    }


def _table(found: Comparison) -> Table:
    from glocal.report import Column, Table

    columns = (
        Column("pattern"),
        Column("speed-up"),
        Column("error"),
        Column("time", "ms"),
        Column("kept", percent=True),
        Column("visited", percent=True),
        Column("memory", "MiB"),
        Column("parameters"),
        Column("backend", code=True),
        Column("time, 5 %", "ms"),
        Column("time, 95 %", "ms"),
        Column("speed-up, low"),
        Column("speed-up, high"),
        Column("planning", "ms"),
        Column("exact to", digits=2),
    )
    rows = []
    for row in found.rows:
        if row.time is None:
            rows.append((row.name, *(None,) * 6, f"{row.what}; did not run: {row.skipped}", *(None,) * 7))
            continue
        time, ratio = row.time, row.speedup
        rows.append(
            (
                row.name,
                1.0 if ratio is None else ratio.median,
                row.error,
                time.median * 1e3,
                row.kept,
                row.visited,
                None if row.memory is None else row.memory / 2**20,
                row.what,
                row.backend,
                time.low * 1e3,
                time.high * 1e3,
                None if ratio is None else ratio.low,
                None if ratio is None else ratio.high,
                None if row.plan_seconds is None else row.plan_seconds * 1e3,
                row.max_error,
            )
        )
    return Table(columns, tuple(rows))


def _write(found: Comparison, known: dict[str, str], out: Path) -> None:
    import datetime
    import json

    from glocal._files import atomic_dir
    from glocal.cli._common import plain
    from glocal.report import TableReport, render_table, table_csv

    spec, table = found.spec, _table(found)
    report = TableReport(
        title="Patterns side by side",
        table=table,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        subtitle=f"{'x'.join(map(str, spec.shape))} tokens, {spec.heads} heads of {spec.head_dim}, {spec.dtype}",
        notes=(
            f"Speed-up is over {found.baseline!r}, the fastest dense kernel present: median and interval of "
            f"{spec.rounds} paired rounds in one process, all patterns once in each round.",
            "Kept: visible pairs. Visited: pairs in the blocks that the kernel computes; time follows these.",
            "Error is the relative distance to dense attention on these inputs; other inputs give other errors.",
            "Planning happens once for a canvas; a router plans in every call, inside its time.",
        ),
        pictures=_pictures(found),
        facts={**known, **_shape(found)},
    )
    record = json.dumps(plain({"facts": known, **_record(found)}), indent=1, allow_nan=False)
    with atomic_dir(out) as folder:
        (folder / "index.html").write_text(render_table(report), encoding="utf-8")
        (folder / "compare.csv").write_text(table_csv(table), encoding="utf-8")
        (folder / "compare.json").write_text(record + "\n", encoding="utf-8")


def _pictures(found: Comparison) -> tuple[Picture, ...]:
    """What the middle token sees under every pattern that ran."""
    from glocal.bench.contenders import contenders
    from glocal.cli._seen import seen_png
    from glocal.patterns import Pattern
    from glocal.report import Picture

    spec = found.spec
    ran = [row.name for row in found.rows if row.skipped is None]
    pictures = []
    for one in contenders(spec.shape, spec.heads, spec.keep):
        if one.name in ran and isinstance(one.method, Pattern):
            middle = tuple(n // 2 for n in spec.shape)
            png = seen_png(one.method, spec.shape, middle)
            pictures.append(Picture(f"{one.name}: {one.what}", png, f"keys that the middle query sees, {one.name}"))
    return tuple(pictures)
