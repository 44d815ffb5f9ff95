"""Benchmark suites by name. A suite is a module with `COLUMNS`, `WORDS` and `run(options) -> rows`; one line here."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from glocal._errors import check_choice
from glocal._progress import NoProgress, Progress

SUITES: dict[str, str] = {
    "kernels": "glocal.bench.kernels",
    "mixers": "glocal.bench.mixer_suite",
    "planning": "glocal.bench.planning",
}


@dataclass(frozen=True)
class Options:
    """device: torch device. cases: names of the suite's cases, None for all. rounds: timed rounds of each contender.
    without: contenders left out. emit: called with the new rows after every case, so that a run that is cut keeps what
    it has. workers: processes that compile ahead, 0 for none.
    """

    device: str = "cuda"
    cases: tuple[str, ...] | None = None
    rounds: int = 7
    progress: Progress = field(default_factory=NoProgress)
    without: tuple[str, ...] = ()
    emit: Callable[[list[tuple[Any, ...]]], None] = lambda rows: None
    workers: int = 0


def suite(name: str) -> ModuleType:
    """The module of a suite; ValueError with the nearest name."""
    check_choice("suite", name, SUITES)
    return import_module(SUITES[name])


def chosen(names: Sequence[str], wanted: tuple[str, ...] | None) -> list[str]:
    """The cases that were asked for, in the order of the suite; ValueError for one that it does not have."""
    if wanted is None:
        return list(names)
    for name in wanted:
        check_choice("case", name, names)
    return [name for name in names if name in wanted]


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
