"""Numbers in words: digits, units, gaps, and values JSON lacks."""

import math

import pytest

from glocal.report import Column, Estimate
from glocal.report import format as fmt


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.5432, "1.54"),
        (-0.01234, "−0.0123"),
        (115200.0, "115\u202f200"),
        (4096, "4096"),
        (115200, "115\u202f200"),
        (1.2e-7, "1.20e−7"),
        (3.456e9, "3.46e9"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_number(value, expected):
    assert fmt.number(value) == expected


def test_times_shares_and_intervals():
    assert fmt.seconds(0.0123) == "12.3\u202fms"
    assert fmt.seconds(2100.0) == "35.0\u202fmin"
    assert fmt.percent(0.256) == "26\u202f%"
    assert fmt.times(1.5) == "1.50×"
    assert fmt.interval(Estimate(1.0, 0.9, 1.1)) == "[0.90, 1.10]"
    assert fmt.interval(Estimate(1.0)) == "" and fmt.interval(None) == ""
    assert fmt.tick(0.30) == "0.3" and fmt.tick(20.0) == "20"
    assert fmt.cell(True, Column("ok")) == "yes" and fmt.cell(0.5, Column("kept", percent=True)) == "50.0\u202f%"


def test_jsonable_names_what_json_lacks():
    assert fmt.jsonable({"a": (1, math.inf), "b": [math.nan, None]}) == {"a": [1, "inf"], "b": ["nan", None]}
    with pytest.raises(TypeError, match="set is no plain value"):
        fmt.jsonable({"a": {1}})
