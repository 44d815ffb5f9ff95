from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from glocal.testing import adapters, check

HERE = Path(__file__).resolve().parent.parent / "golden"
SYSTEMS = ("dinat", "fna", "gna", "radial", "s2_attention")
CASES = [f"{slug}/{file.name}" for slug in SYSTEMS for file in sorted((HERE / slug).glob("*"))]


def test_every_system_here_has_an_adapter() -> None:
    assert set(SYSTEMS) <= set(adapters())
    assert len(CASES) == 62


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_case_equals_the_published_numbers(name: str, backend: str, golden: Callable[[str], Path]) -> None:
    result = check(golden(name), backend=backend)
    assert result.passed, result.verdict
    assert result.not_compared == {}
