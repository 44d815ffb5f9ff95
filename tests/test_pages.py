"""What the hooks of the documentation put into pages."""

from __future__ import annotations

import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HOOKS = Path(__file__).resolve().parents[1] / "docs" / "hooks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(HOOKS))
    import tables  # type: ignore[import-not-found]

    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    yield tables
    del sys.modules["tables"]


def test_a_figure_of_the_results_stands_in_the_page(tables: Any, tmp_path: Path) -> None:
    (tmp_path / "results" / "curves.svg").write_text("<svg>a curve</svg>")
    page = tables.on_page_markdown("before <!-- picture: curves.svg | error < work --> after")
    head, found = page.split('src="data:image/svg+xml;base64,')
    assert head == 'before <img alt="error &lt; work" '
    assert b64decode(found.split('"')[0]).decode() == "<svg>a curve</svg>" and found.endswith("> after")


def test_a_figure_that_is_not_there_is_told(tables: Any) -> None:
    assert tables.on_page_markdown("<!-- picture: none.svg | x -->") == "No figure is present at results/none.svg."
