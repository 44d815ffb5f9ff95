"""The table of systems: complete, well formed, and with a status that follows from evidence alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from glocal import systems as table
from glocal.systems import Evidence, System

HEAD = "system,case,backend,device,max_error,tolerance,passed,skipped,versions\n"


def case(system: str, name: str = "a", passed: bool = True, error: float = 5e-5, skipped: str = "") -> Evidence:
    return Evidence(system, name, "reference", "cpu", error, 1e-4, passed, skipped)


def test_there_are_51_rows_with_one_name_each() -> None:
    slugs = [row.slug for row in table.systems()]
    assert len(slugs) == len(set(slugs)) == 51
    assert all(re.fullmatch(r"[a-z0-9_]+", slug) for slug in slugs)


@pytest.mark.parametrize("row", table.systems(), ids=lambda row: row.slug)
def test_row_is_well_formed(row: System) -> None:
    assert re.fullmatch(r"\d{4}\.\d{5}", row.arxiv)
    assert row.title
    assert row.code
    assert row.host
    legal = table.kinds()
    assert row.kind in legal["kind"]
    assert set(row.local) <= set(legal["local"])
    assert set(row.global_) <= set(legal["global"])
    assert set(row.merge) <= set(legal["merge"])
    assert set(row.host) <= set(legal["host"])


def test_papers_are_distinct() -> None:
    assert len({row.arxiv for row in table.systems()}) == 51


def test_unknown_system_names_the_closest() -> None:
    with pytest.raises(
        ValueError, match=r"no system is called 'biforma'; closest: biformer, .*`glocal list` has all 51"
    ):
        table.system("biforma")
    with pytest.raises(ValueError, match="no name is close"):
        table.system("zzzzzz")
    assert table.system("gna").slug == "gna"


def test_evidence_reads_a_table_of_cases(tmp_path: Path) -> None:
    file = tmp_path / "parity.csv"
    file.write_text(HEAD + "gna,na1d,flex,cpu,1e-6,1e-4,true,,torch 2\nfna,rpb,,cpu,,,false,needs CUDA,torch 2\n")
    ran, skipped = table.evidence(file)
    assert ran == Evidence("gna", "na1d", "flex", "cpu", 1e-6, 1e-4, True, "")
    assert skipped.skipped == "needs CUDA"
    assert math.isnan(skipped.max_error)


def test_broken_evidence_is_named(tmp_path: Path) -> None:
    file = tmp_path / "parity.csv"
    file.write_text(HEAD + "gna,na1d,flex,cpu,much,1e-4,true,,torch 2\n")
    with pytest.raises(ValueError, match=r"parity\.csv: row .* is no parity case"):
        table.evidence(file)


def test_status_follows_from_code_and_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = table.system("dinat")
    monkeypatch.setattr(table, "PACKAGE", tmp_path)
    assert table.status("dinat", ()).state == "planned"
    assert table.status("dinat", ()).missing == row.code

    def write(name: str) -> None:
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")

    write(row.code[0])
    assert table.status("dinat", (case("dinat"),)).state == "partial"
    for name in row.code:
        write(name)
    assert table.status("dinat", ()).state == "built"
    assert table.status("dinat", (case("dinat", skipped="no CUDA"),)).state == "built"
    assert table.status("dinat", (case("gna"),)).state == "built"
    assert table.status("dinat", (case("dinat"), case("dinat", passed=False, error=1.0))).state == "failing"
    found = table.status("dinat", (case("dinat"), case("dinat"), case("dinat", "b", skipped="no CUDA")))
    assert (found.state, found.passed, found.failed, found.skipped) == ("parity", 1, 0, 1)
    found = table.status("dinat", (case("dinat"), case("dinat", passed=False), case("dinat", "b")))
    assert (found.state, found.passed, found.failed) == ("failing", 1, 1)
    found = table.status("dinat", (case("dinat"), case("dinat", "b", skipped="no CUDA")))
    assert found.worst == pytest.approx(0.5)
