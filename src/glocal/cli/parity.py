"""glocal parity: golden cases of the authors through our code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glocal._errors import CheckFailed, check_file
from glocal._files import write_atomic
from glocal.cli._common import Json, Quiet, print_json, print_table, progress


def command(
    files: Annotated[
        list[Path], typer.Argument(help="Golden cases (.safetensors, .json), each in its system's folder.")
    ],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Attention backend, or all; repeat for several.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="CSV file for the results.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run golden cases of the authors through our code.

    Prints the largest error of each; exit code 1 if one fails. A skipped case, and every published tensor that is not
    compared, names its reason.
    """
    from glocal.testing.parity import check_all, table

    for file in files:
        check_file("FILE", file)
    bar = progress(quiet or json)
    results = check_all(files, device, ("auto",) if backend is None else backend, bar)
    bar.close()
    if out is not None:
        write_atomic(out, table(results))
    failed = [r for r in results if not r.passed and not r.skipped]
    skipped = [r for r in results if r.skipped]
    if json:
        print_json(results)
    else:
        columns = ("system", "case", "backend", "max error", "tolerance", "result")
        print_table(columns, [(r.system, r.case, r.backend, r.max_error, r.tolerance, r.verdict) for r in results])
        for r in results:
            for name, why in r.not_compared.items():
                print(f"{r.system}/{r.case}: {name} not compared: {why}")
        print(f"{len(results) - len(failed) - len(skipped)} passed, {len(failed)} failed, {len(skipped)} skipped")
    if failed:
        names = ", ".join(f"{r.system}/{r.case}" for r in failed)
        raise CheckFailed(f"{len(failed)} of {len(results)} cases: {names}")
