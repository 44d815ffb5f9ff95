"""glocal show: one system, its parts, its code and every parity case."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from glocal import systems as table
from glocal.cli._common import Json, print_fields, print_json, print_table


def command(
    system: Annotated[str, typer.Argument(help="A name from `glocal list`.")],
    json: Json = False,
) -> None:
    """Show one system: paper, parts, code, parity cases."""
    row = table.system(system)
    everything = table.evidence()
    cases = [case for case in everything if case.system == row.slug]
    found = table.status(row.slug, everything)
    if json:
        fields = {name.rstrip("_"): value for name, value in asdict(row).items()}
        print_json({**fields, "url": row.url, "status": found, "cases": cases})
        return
    print_fields(
        {
            "system": row.slug,
            "title": row.title,
            "paper": row.url if not row.venue else f"{row.url} ({row.venue})",
            "known from": {"code": "the authors' code", "paper": "the paper's text", "abstract": "its abstract"}[
                row.source
            ],
            "kind": row.kind,
            "local": row.local,
            "global": row.global_,
            "merge": row.merge,
            "host": row.host,
            "code": [f"glocal/{name}" + (" (missing)" if name in found.missing else "") for name in row.code],
            "status": found.state,
            "cases": f"{found.passed} passed, {found.failed} failed, {found.skipped} skipped",
        }
    )
    if cases:
        print()
        print_table(
            ("case", "backend", "device", "max error", "tolerance", "result"),
            [(case.case, case.backend, case.device, case.max_error, case.tolerance, _result(case)) for case in cases],
        )


def _result(case: table.Evidence) -> str:
    if case.skipped:
        return f"skipped: {case.skipped}"
    return "passed" if case.passed else "FAILED"
