"""What rows of large pictures say of a method against naive sampling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    import highres_verdicts  # type: ignore[import-not-found]

    yield highres_verdicts
    del sys.modules["highres_verdicts"]


def rows(side: str, method: str, seeds: int, **measures: tuple[float, str]) -> list[dict[str, str]]:
    head = {"model": "unet", "side": side, "method": method, "seeds": str(seeds)}
    return [head | {"measure": n, "mean": str(m), "better": b} for n, (m, b) in measures.items()]


@pytest.mark.parametrize(
    ("right", "extra", "word"),
    [
        ("yes", "unclear", "improves"),
        ("unclear", "yes", "improves"),
        ("yes", "no", "mixed"),
        ("unclear", "unclear", "no clear change"),
        ("unclear", "no", "worse"),
    ],
)
def test_a_method_improves_where_one_measure_does_and_none_is_worse(
    said: Any, right: str, extra: str, word: str
) -> None:
    assert said.verdict(right, extra) == word


def test_lines_name_each_method_once_behind_its_verdict(said: Any) -> None:
    table = rows("64", "naive", 48, right=(0.4, ""), extra=(1.0, ""))
    table += rows("128", "naive", 48, right=(0.1, ""), extra=(6.0, ""))
    table += rows("128", "hidiffusion", 12, right=(0.25, "yes"), extra=(4.0, "yes"))
    table += rows("128", "regions, no priors", 48, right=(0.1, "unclear"), extra=(7.0, "no"))
    found = said.lines(table)
    assert found[0] == "**UNet, 128 px**, 48 captions; naive: 10% in place, 6.0 too many."
    assert found[2].startswith("- improves") and "`hidiffusion` 25% in place, 4.0 too many (12 captions)" in found[2]
    assert found[3].startswith("- worse") and "hidiffusion" not in found[3] and "`regions, no priors`" in found[3]
    assert "64 px" not in "".join(found)  # nothing stands beside naive there
    shown = "- UNet, 128 px, `regions, no priors`: **worse**, 10% in place, 7.0 too many"
    assert said.of_method(table, "regions") == [f"{shown} (naive: 10% in place, 6.0 too many)"]
