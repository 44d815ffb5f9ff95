"""A table with title and notes, as a page, as plain text, as CSV: what `compare` and `bench` print."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from glocal.report import format as fmt
from glocal.report.records import Picture, Table
from glocal.report.render import environment, numeric, script_json


@dataclass(frozen=True)
class TableReport:
    """One table and what to know about it. facts: device, versions, shapes. notice: printed above everything."""

    title: str
    table: Table
    created: str
    subtitle: str = ""
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    notice: str | None = None


def _heading(name: str, unit: str | None) -> str:
    return name if unit is None else f"{name} ({unit})"


def rows_of(table: Table) -> list[dict[str, object]]:
    """Rows as mappings from heading to raw value."""
    names = [_heading(column.name, column.unit) for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in table.rows]


def render_table(report: TableReport) -> str:
    """The report as one self-contained HTML page with a sortable table."""
    template = environment().get_template("table.html.j2")
    return template.render(report=report, rows_json=script_json(rows_of(report.table)))


def table_text(table: Table) -> str:
    """The table in plain text: numbers right, words left, two spaces between columns."""
    heads = [_heading(column.name, column.unit) for column in table.columns]
    cells = [[fmt.cell(value, column) for value, column in zip(row, table.columns, strict=True)] for row in table.rows]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    right = [numeric(table, index) for index in range(len(heads))]
    lines = []
    for line in [heads, ["-" * width for width in widths], *cells]:
        padded = [
            word.rjust(width) if to_right else word.ljust(width)
            for word, width, to_right in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    if table.note is not None:
        lines += ["", table.note]
    return "\n".join(lines) + "\n"


def table_csv(table: Table) -> str:
    """The table as CSV (RFC 4180) with raw values; missing cells are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([_heading(column.name, column.unit) for column in table.columns])
    writer.writerows([["" if value is None else value for value in row] for row in table.rows])
    return buffer.getvalue()
