"""What the verbs share: options, tables, JSON, progress, and reading extents such as 30x48x80."""

from __future__ import annotations

import dataclasses
import json as _json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from glocal._progress import NoProgress, Progress, TextProgress

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


def extents(text: str, option: str, axes: int | None = None) -> tuple[int, ...]:
    """Read `30x48x80` as (30, 48, 80). `option` is how the user calls it; `axes` the number of axes it must have."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text!r}: expected positive integers joined by x, such as 30x48x80")
    if axes is not None and len(parts) != axes:
        raise ValueError(f"{option} {text!r} has {len(parts)} axes; expected {axes}, one for each axis of the canvas")
    return tuple(int(part) for part in parts)


def check_idle(ctx: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise ValueError if one of the options `names` is given, which nobody would read; `why` goes behind its name."""
    for name in names:
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} says nothing {why}, or leave it out")


def check_folder(out: Path | None) -> None:
    """Raise ValueError where `--out` names a file: the verb would find out after its work."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"-o {str(out)!r} is a file; give a folder")


def plain(value: Any) -> Any:
    """What JSON can hold: dataclasses and mappings become objects, sequences lists, NaN and infinities null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name.rstrip("_"): plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_json(value: Any) -> None:
    """Print `value` as JSON, indented, keys in the order given."""
    print(_json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """Print rows under columns: a rich table on a terminal, aligned plain text elsewhere. Numbers lie right."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name, is_right in zip(columns, right, strict=True):
            table.add_column(name, justify="right" if is_right else "left")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))  # Text: a bracket in a cell is no markup
        Console().print(table)
        return
    if title is not None:
        print(title)
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    for row in [list(columns), *cells]:
        padded = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        print("  ".join(padded).rstrip())


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print `name  value` lines, names padded to one width."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        print(f"{name.ljust(width)}  {_cell(value)}".rstrip())


def progress(quiet: bool = False) -> Progress:
    """A bar on a terminal, lines in a log, nothing if `quiet`; always on stderr, so that stdout stays the result's."""
    if quiet:
        return NoProgress()
    if sys.stderr.isatty():
        from glocal.cli._bars import RichProgress

        return RichProgress()
    return TextProgress()


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value)) if value else "-"
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
