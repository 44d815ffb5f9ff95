"""glocal list: the systems, by kind, parts and evidence."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from glocal import systems as table
from glocal._errors import check_choice
from glocal.cli._common import Json, print_json, print_table


def command(
    kind: Annotated[str | None, typer.Option(help="Only this kind: operator, backbone, generation, ...")] = None,
    local: Annotated[
        str | None, typer.Option(help="Only with this local part: neighborhood, window, routed, ...")
    ] = None,
    global_: Annotated[
        str | None, typer.Option("--global", help="Only with this global part: dilated, pooled, channel, ...")
    ] = None,
    merge: Annotated[str | None, typer.Option(help="Only with this merge: lse, heads, sum, sequence, ...")] = None,
    status: Annotated[
        str | None, typer.Option(help="Only with this status: planned, partial, built, failing or parity.")
    ] = None,
    json: Json = False,
) -> None:
    """List the systems by their parts, with their evidence."""
    wanted = {"kind": kind, "local": local, "global": global_, "merge": merge, "status": status}
    for option, value in wanted.items():
        if value is not None:
            check_choice(f"--{option}", value, table.kinds()[option])

    cases = table.evidence()
    rows = [(row, table.status(row.slug, cases)) for row in table.systems()]
    kept = [
        (row, found)
        for row, found in rows
        if kind in (None, row.kind)
        and status in (None, found.state)
        and all(
            value is None or value in part
            for value, part in ((local, row.local), (global_, row.global_), (merge, row.merge))
        )
    ]
    if json:
        print_json([{**{k.rstrip("_"): v for k, v in asdict(row).items()}, "status": found} for row, found in kept])
        return
    print_table(
        ("system", "kind", "local", "global", "merge", "host", "status"),
        [(row.slug, row.kind, row.local, row.global_, row.merge, row.host, _words(found)) for row, found in kept],
    )
    print(f"{len(kept)} of {len(rows)} systems")


def _words(found: table.Status) -> str:
    if found.passed + found.failed == 0:
        return found.state
    return f"{found.state} ({found.passed} of {found.passed + found.failed} cases)"
