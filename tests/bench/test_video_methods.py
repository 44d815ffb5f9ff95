"""The driver of error against work: its budgets, and rows of earlier ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from glocal.adapt.radial import RadialSettings, density

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    import video_methods  # type: ignore[import-not-found]

    yield video_methods
    for name in ("video_methods", "advise_evidence"):
        sys.modules.pop(name, None)


def test_no_two_budgets_of_radial_keep_the_same(driver: Any) -> None:
    for system in ("radial", "radial, rectified"):
        settings = [v | {"dense_steps": 0, "dense_layers": 0} for v in driver.BUDGETS[system]]
        kept = [density(RadialSettings(**v), 16, 256) for v in settings]
        assert len(kept) == 5 and all(a + 0.02 < b for a, b in pairwise(kept)), kept


def test_rows_of_budgets_that_are_gone_go(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    rows = [driver.row_of("radial", settings, [0.5, 0.6], visited="0.5") for settings in ("decay=0.1", "decay=0.5")] + [
        driver.row_of("glocal advise", "work=0.6", [0.1, 0.1], visited="0.6")
    ]
    driver.write(rows, out)
    monkeypatch.setattr(sys, "argv", ["video_methods.py", "--figure-only", "--carry", str(out), "--out", str(out)])
    assert driver.main() == 0
    text = out.read_text()
    assert "decay=0.1" not in text and "decay=0.5" in text and "work=0.6" in text
    assert out.with_suffix(".svg").is_file()
