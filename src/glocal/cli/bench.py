"""glocal bench: a suite of benchmarks on this machine, side by side, into a table of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glocal.cli._common import Json, Quiet, print_json, print_table, progress


def command(
    name: Annotated[str, typer.Argument(help="kernels, planning or mixers.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this case; of mixers, a name or my.py:Mine; repeat for several."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each contender.")] = 7,
    without: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave this contender out; repeat for several.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile ahead of timing.")] = 0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="CSV file (default: results/NAME-DEVICE.csv).")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a suite of benchmarks, correctness first.

    Times are interleaved in one process; a wrong contender gets none. Exit code 1 if one of ours is wrong.
    """
    from glocal._errors import CheckFailed
    from glocal._files import write_atomic
    from glocal.bench.suites import Options, suite, table
    from glocal.cli._machine import torch_device
    from glocal.plan.devices.table import slug

    module = suite(name)
    if rounds < 2:
        raise ValueError(f"--rounds {rounds}; legal: at least 2")
    bar = progress(quiet or json)
    device = torch_device(device)
    where = _title(device)
    target = Path("results") / f"{name}-{slug(where)}.csv" if out is None else out
    kept: list[tuple[Any, ...]] = []

    def emit(rows: list[tuple[Any, ...]]) -> None:
        kept.extend(rows)
        write_atomic(target, table(module.COLUMNS, kept))

    cases = None if case is None else tuple(case)
    rows = module.run(Options(device, cases, rounds, bar, () if without is None else tuple(without), emit, workers))
    bar.close()
    records = [dict(zip(module.COLUMNS, row, strict=True)) for row in rows]
    if json:
        print_json({"suite": name, "device": where, "rows": records})
    else:
        shown = [c for c in module.COLUMNS if c not in ("device", "versions")]
        print_table(shown, [[r[c] for c in shown] for r in records], title=f"{module.WORDS}, on {where}")
        print(f"written: {target}")
    wrong = module.wrong(records)
    if wrong:
        raise CheckFailed("; ".join(wrong))


def _title(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
