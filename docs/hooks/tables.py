"""Puts tables made from the code into pages: `<!-- table: systems -->`, `<!-- table: parity -->`, and rows of results:
`<!-- results: kernels-*.csv | case, ms | pass=forward, method~radial, ms -->` (files, columns, conditions: equal, a
part of the cell; a bare name: not empty). `<!-- picture: video_methods.svg | words -->` shows a figure of results/.
"""

from __future__ import annotations

import csv
import html
import re
import sys
from base64 import b64encode
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from glocal import systems as table

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "systems"
NUMBER = re.compile(r"(-?[0-9.,]+(e[-+]?[0-9]+)?)?")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for each page."""
    for name, make in (("systems", systems_table), ("parity", parity_table)):
        mark = f"<!-- table: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    markdown = re.sub(r"<!-- picture: ([^|>]+)\|([^>]+)-->", lambda m: picture(*m.groups()), markdown)
    return re.sub(r"<!-- results: ([^|>]+)\|([^|>]+)(?:\|([^>]*))?-->", lambda m: results_table(*m.groups()), markdown)


def picture(file: str, words: str) -> str:
    """A figure that a driver drew, inside the page; a line in words where there is none."""
    path = ROOT / "results" / file.strip()
    if not path.is_file():
        return f"No figure is present at results/{file.strip()}."
    drawn = b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(words.strip())}" src="data:image/svg+xml;base64,{drawn}">'


def results_table(files: str, columns: str, conditions: str | None) -> str:
    """Rows of results files; a line in words where there are none."""
    names = [c.strip() for c in columns.split(",")]
    wanted = [c.strip() for c in conditions.split(",")] if conditions and conditions.strip() else []
    found: list[tuple[str, ...]] = []
    for path in sorted((ROOT / "results").glob(files.strip())):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if all(_holds(row, condition) for condition in wanted):
                    found.append(tuple(row.get(name, "") for name in names))
    return measured(tuple(names), found) if found else f"No rows are present in results/{files.strip()}."


def _holds(row: dict[str, str], condition: str) -> bool:
    """`name=value`, `name~part` or `name`, of a row."""
    name, mark, value = re.fullmatch(r"([^=~]+)([=~]?)(.*)", condition).groups()  # type: ignore[union-attr]
    cell = row.get(name, "")
    return cell == value if mark == "=" else value in cell if mark == "~" else bool(cell)


def systems_table() -> str:
    """One row a system, its status computed."""
    cases = table.evidence()
    head = ("system", "paper", "status", "kind", "local", "global", "merge", "host")
    rows = [
        (
            f"[{row.slug}](systems/{row.slug}.md)" if (PAGES / f"{row.slug}.md").is_file() else row.slug,
            f"[{row.arxiv}]({row.url} '{row.title}')",
            table.status(row.slug, cases).state,
            row.kind,
            *(", ".join(part) for part in (row.local, row.global_, row.merge, row.host)),
        )
        for row in table.systems()
    ]
    return _markdown(head, rows)


def parity_table() -> str:
    """One row a golden case; a line in words where nothing was measured."""
    cases = table.evidence()
    if not cases:
        return "No parity file is present: run `make parity`."
    rows = [(case.system, case.case, case.backend, case.device, *_numbers(case)) for case in cases]
    return _markdown(("system", "case", "backend", "device", "largest error", "tolerance", "result"), rows)


def _numbers(case: table.Evidence) -> tuple[str, str, str]:
    if case.skipped:
        return "", "", f"skipped: {case.skipped}"
    return f"{case.max_error:.2e}", f"{case.tolerance:.0e}", "passed" if case.passed else "FAILED"


def measured(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of results. What all rows share, such as the device, stands once below it."""
    shared = [i for i in range(len(head)) if len(rows) > 1 and len({row[i] for row in rows}) == 1]
    kept = [i for i in range(len(head)) if i not in shared]
    below = ", ".join(f"{head[i]} {rows[0][i]}" for i in shared if rows[0][i])
    names = tuple(head[i].replace("_", "_<wbr>") for i in kept)  # long names may be broken there
    body = _markdown(names, [tuple(row[i] for i in kept) for row in rows])
    return f"{body}\n\nAll rows: {below}." if below else body


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    right = [all(NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(head))]
    lines = [head, tuple("--:" if number else "---" for number in right), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
