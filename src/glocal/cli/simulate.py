"""glocal simulate: kept work, tile waste and speed-up bound of a pattern on a canvas; needs no GPU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glocal.cli._common import Json, check_idle, extents, print_fields, print_json, print_table
from glocal.cli._windows import PATTERNS, pattern_name, per_axis, window_rules

if TYPE_CHECKING:
    from glocal.plan.simulate import Simulation


def command(
    ctx: typer.Context,
    pattern: Annotated[str, typer.Argument(help="; ".join(f"{name}: {text}" for name, text in PATTERNS.items()) + ".")],
    canvas: Annotated[str, typer.Option(help="Tokens per axis, such as 30x48x80.")],
    window: Annotated[str | None, typer.Option(help="Keys per axis; 'full' is a whole axis: fullx24x24.")] = None,
    stride: Annotated[str | None, typer.Option(help="Queries per axis that share a window.")] = None,
    dilation: Annotated[str | None, typer.Option(help="Step between seen keys per axis.")] = None,
    causal: Annotated[str | None, typer.Option(help="Axes without later keys: 'all' or numbers, such as 0,2.")] = None,
    q_tile: Annotated[str | None, typer.Option(help="Tokens of a query tile per axis.")] = None,
    kv_tile: Annotated[
        str | None, typer.Option(help="Tokens of a key tile per axis (default: the query tile).")
    ] = None,
    tiling: Annotated[str, typer.Option(help="Key tiles on the canvas grid (static) or from the window (dynamic).")] = (
        "static"
    ),
    schedule: Annotated[str, typer.Option(help="Which tile sets the pace: worst or mean.")] = "worst",
    share: Annotated[float | None, typer.Option(help="Share of self-attention in the whole time, 0 to 1.")] = None,
    raster: Annotated[bool, typer.Option("--raster", help="Also count blocks of consecutive raster tokens.")] = False,
    search: Annotated[str | None, typer.Option(help="strides or tiles: list the ones worth using.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens of the tiles to search.")] = "64,128,256",
    device: Annotated[
        str | None, typer.Option(help="Forecast the time there: h100, h200, or a table file of `glocal env --measure`.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Of --device: heads times batch.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Of --device: size of a head.")] = None,
    dtype: Annotated[str, typer.Option(help="Of --device: float32, bfloat16 or float16.")] = "bfloat16",
    direction: Annotated[str, typer.Option(help="Of --device: forward or backward.")] = "forward",
    json: Json = False,
) -> None:
    """Forecast what a pattern can save; no GPU needed.

    Kept work, tile waste, the bound on the speed-up, and with --device a time.
    """
    from glocal._errors import check_choice
    from glocal.plan.simulate import simulate
    from glocal.plan.tiles import search_tiles

    shape = extents(canvas, "--canvas")
    if search is not None:
        check_choice("--search", search, ("strides", "tiles"))
    check_choice("--direction", direction, ("forward", "backward"))
    if device is None:
        check_idle(ctx, ("heads", "head_dim", "dtype", "direction"), "without --device; add it")
    tile = None if q_tile is None else per_axis(q_tile, "--q-tile", shape)
    given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    axes = window_rules(pattern, shape, given, tile)
    note = ""
    kwargs: dict[str, Any] = {"tiling": tiling, "schedule": schedule}
    if tile is None:
        if kv_tile is not None:
            raise ValueError(f"--kv-tile {kv_tile!r} without --q-tile; give both, or none to take the best")
        best = search_tiles(shape, axes, q_sizes=_sizes(tokens), kv_sizes=_sizes(tokens), top=1, **kwargs).best[0]
        result, note = best, f" (fastest of all tiles of {tokens} tokens)"
    else:
        key_tile = tile if kv_tile is None else per_axis(kv_tile, "--kv-tile", shape)
        result = simulate(shape, axes, tile, key_tile, **kwargs)

    record: dict[str, Any] = {"pattern": pattern_name(pattern), **result.as_dict(share)}
    if raster:
        record["raster"] = _raster(result)
    if device is not None:
        record["forecast"] = _forecast(result, device, heads, head_dim, dtype, direction)
    if search == "strides":
        record["strides"] = _stride_rows(result, share)
    elif search == "tiles":
        found = search_tiles(shape, axes, q_sizes=_sizes(tokens), kv_sizes=_sizes(tokens), top=10, **kwargs)
        record["tiles"] = {"considered": found.considered, "best": [s.as_dict(share) for s in found.best]}
    if json:
        print_json(record)
    else:
        _print(record, result, note)


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--tokens {text!r}; legal: positive integers joined by commas, such as 64,128,256")
    return tuple(int(part) for part in parts)


def _raster(result: Simulation) -> dict[str, float]:
    from glocal.plan.raster import simulate_raster

    counts = simulate_raster(
        result.canvas, [a.window for a in result.axes], math.prod(result.q_tile), math.prod(result.kv_tile)
    )
    op = counts.worst_speedup if result.schedule == "worst" else counts.mean_speedup
    return {"q_block": counts.q_block, "kv_block": counts.kv_block, "op_speedup": op, "waste": counts.waste}


def _forecast(
    result: Simulation, device: str, heads: int | None, head_dim: int | None, dtype: str, direction: str
) -> dict[str, Any]:
    from glocal.plan.cost import forecast

    if heads is None or head_dim is None:
        missing = "--heads" if heads is None else "--head-dim"
        raise ValueError(f"--device {device!r} needs {missing}; such as --heads 24 --head-dim 128")
    kind: Any = direction
    return forecast(result, heads, head_dim, device, dtype=dtype, direction=kind).as_dict()


def _stride_rows(result: Simulation, share: float | None) -> dict[str, Any]:
    from glocal.plan.tiles import search_strides

    rules = [a.window for a in result.axes]
    found = search_strides(
        result.canvas, rules, result.q_tile, result.kv_tile, tiling=result.tiling, schedule=result.schedule
    )
    return {
        "considered": found.considered,
        "front": [s.as_dict(share) for s in found.front],
        "perfect": None if found.perfect is None else found.perfect.as_dict(share),
    }


def _print(record: dict[str, Any], result: Simulation, note: str) -> None:
    from glocal.plan.checks import size_text

    rule = [f"window {size_text(record['window'])}", f"stride {size_text(record['stride'])}"]
    if max(record["dilation"]) > 1:
        rule.append(f"dilation {size_text(record['dilation'])}")
    if any(record["causal"]):
        rule.append(f"causal axes {', '.join(str(i) for i, c in enumerate(record['causal']) if c)}")
    fields = {
        "pattern": f"{record['pattern']}: {', '.join(rule)}",
        "canvas": f"{size_text(result.canvas)} ({result.tokens:,} tokens)",
        "tiles": f"queries {size_text(result.q_tile)}, keys {size_text(result.kv_tile)}, {result.tiling}{note}",
        "kept": f"{100 * result.kept:.2f} % of all pairs",
        "key tiles a query tile": f"worst {result.worst:,}, mean {result.mean:,.1f}, dense {result.dense_visits:,}",
        "blocks": f"{result.full_blocks:,} full, {result.partial_blocks:,} partial, of {result.dense_blocks:,}",
        "pairs computed": f"{result.waste:.3f} x the visible ones",
        "op speed-up": f"{result.op_speedup:.2f}x (worst {result.worst_speedup:.2f}x, mean {result.mean_speedup:.2f}x)",
        "  dense unpadded": f"{result.effective_speedup:.2f}x against a dense kernel without ragged tiles",
        "  backward": f"{result.backward.op_speedup:.2f}x (key and value gradients, {result.schedule} key tile)",
        "bound by FLOPs": f"{result.flop_bound:.2f}x",
        "perfectly block sparse": "yes" if result.perfectly_block_sparse else "no",
    }
    if "share" in record:
        fields["end to end"] = (
            f"{record['end_to_end']:.2f}x, bound {record['end_to_end_bound']:.2f}x (share {record['share']:g})"
        )
    if "raster" in record:
        row = record["raster"]
        fields["raster order"] = (
            f"{row['op_speedup']:.2f}x, pairs computed {row['waste']:.3f} x the visible ones "
            f"(blocks of {row['q_block']} queries, {row['kv_block']} keys)"
        )
    print_fields(fields)
    if "forecast" in record:
        _print_forecast(record["forecast"])
    if "strides" in record:
        found = record["strides"]
        print()
        _print_rows(found["front"], f"strides worth using, of {found['considered']:,}, finest first", "stride")
        best = found["perfect"]
        print(f"finest perfectly block sparse stride: {'none' if best is None else size_text(best['stride'])}")
    if "tiles" in record:
        found = record["tiles"]
        print()
        _print_rows(found["best"], f"fastest tiles, of {found['considered']:,} pairs", "q_tile", "kv_tile")


def _print_forecast(row: dict[str, Any]) -> None:
    print()
    terms = ("launch", "full", "partial", "imbalance", "reorder", "routing")
    parts = ", ".join(f"{name} {1e3 * row[name]:.3g}" for name in terms if row[name])
    print_fields(
        {
            f"forecast on {row['device']}": f"{1e3 * row['seconds']:.3g} ms with {row['kernel']} ({parts})",
            "dense there": f"{1e3 * row['dense_seconds']:.3g} ms with {row['dense_kernel']}: {row['speedup']:.2f}x",
            "visible pairs alone": f"{1e3 * row['ideal_seconds']:.3g} ms at the dense rate",
        }
    )
    for note in row["notes"]:
        print(f"  {note}")


def _print_rows(rows: list[dict[str, Any]], title: str, *keys: str) -> None:
    from glocal.plan.checks import size_text

    shown = ["op_speedup", "effective_speedup", "mean_speedup", "waste"]
    if rows and "end_to_end" in rows[0]:
        shown.append("end_to_end")
    names = [*(key.replace("_", " ") for key in keys), *(name.replace("_", " ") for name in shown), "perfect"]
    cells = [
        [
            *(size_text(row[key]) for key in keys),
            *(f"{row[name]:.3f}" for name in shown),
            "yes" if row["perfectly_block_sparse"] else "no",
        ]
        for row in rows
    ]
    print_table(names, cells, title)
