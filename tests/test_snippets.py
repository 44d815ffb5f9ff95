"""Every Python snippet of the README, CONTRIBUTING and the docs runs; the snippets of one page share their names."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from glocal.nn.mixer import _BUILDERS, list_mixers

list_mixers()  # before names are copied: each file is loaded once
ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if FENCE.search(page.read_text())
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_module("glocal.nn.mixer"), "_BUILDERS", dict(_BUILDERS))  # CONTRIBUTING registers one
    names: dict[str, object] = {}
    for number, code in enumerate(FENCE.findall(page.read_text()), start=1):
        exec(compile(code, f"{page.name} snippet {number}", "exec"), names)
