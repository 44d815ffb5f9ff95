"""Named points over a logarithmic axis."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from glocal.report.charts.scatter import Dot, scatter


def test_every_point_is_drawn_and_named() -> None:
    picture = scatter([Dot("a<b", 100, 0.5, 0.1), Dot("c", 1000, 0.7)], "images a second", "accuracy")
    root = ElementTree.fromstring(picture)
    names = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert "a<b" in names and "c" in names and "accuracy" in names
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 and float(circles[0].attrib["cx"]) < float(circles[1].attrib["cx"])


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="no points"):
        scatter([], "x", "y")
    with pytest.raises(ValueError, match="must be positive"):
        scatter([Dot("a", 0, 1)], "x", "y")
