"""Table reports as page, text and CSV; records refuse what does not fit."""

import csv
import io
import json
import re

import pytest

from glocal.report import (
    Column,
    Curve,
    CurvePoint,
    Estimate,
    ForecastPoint,
    Headline,
    KeptMap,
    Picture,
    Table,
    TableReport,
    TimeBar,
    png_bytes,
    render_table,
    table_csv,
    table_text,
)

TABLE = Table(
    (Column("pattern"), Column("time", "ms"), Column("kept", percent=True), Column("exact")),
    (("dense", 33.0, 1.0, True), ("a <b> & c, d", 14.25, 0.4, False), ("flex", None, None, None)),
    note="Medians of 20 calls.",
)


def test_text_lines_up():
    lines = table_text(TABLE).splitlines()
    assert lines[0].split() == ["pattern", "time", "(ms)", "kept", "exact"]
    end = lines[0].index(")") + 1
    assert [line[:end].split()[-1] for line in lines[2:5]] == ["33.0", "14.2", "–"]
    assert all(line[end : end + 1] in (" ", "") for line in lines[:5])
    assert lines[-1] == "Medians of 20 calls."


def test_csv_keeps_raw_values():
    rows = list(csv.reader(io.StringIO(table_csv(TABLE))))
    assert rows[0] == ["pattern", "time (ms)", "kept", "exact"]
    assert rows[2] == ["a <b> & c, d", "14.25", "0.4", "False"] and rows[3] == ["flex", "", "", ""]


def test_page_escapes_and_carries_rows():
    report = TableReport(
        "Patterns side by side",
        TABLE,
        "2026-01-01",
        notes=("Synthetic rows.",),
        pictures=(Picture("one", png_bytes([[[0, 0, 0]]]), "black"),),
        facts={"device": "2 CPU cores"},
    )
    page = render_table(report)
    assert "a &lt;b&gt; &amp; c, d" in page and "<b> &" not in page
    assert "http://" not in page and "https://" not in page
    rows = re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.S)
    assert rows is not None and json.loads(rows.group(1))[1]["time (ms)"] == 14.25


def test_records_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="row 0 has 1 cells, the table has 2 columns"):
        Table((Column("a"), Column("b")), (("x",),))
    with pytest.raises(ValueError, match="values must be 2 layers x 1 buckets, got 1 rows"):
        KeptMap(("0", "1"), ("all",), ((0.5,),))
    with pytest.raises(ValueError, match="status is 'great'; legal: validated, candidate, demonstration, dense"):
        Headline("great", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="points is empty; a curve needs at least the dense point"):
        Curve(())
    with pytest.raises(ValueError, match="parts of bar 'dense' must be times >= 0 with a positive sum"):
        TimeBar("dense", ())
    with pytest.raises(ValueError, match="forecast 'a' is 0, measured 1.0; both must be positive"):
        ForecastPoint("a", 0, 1.0)
    with pytest.raises(ValueError, match="kind of point 'a' is 'x'; legal: chosen, allocation"):
        CurvePoint("a", "x", Estimate(1.0), Estimate(1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="status is 'dense' but reason is None"):
        Headline("dense", 0)
