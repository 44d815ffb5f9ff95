"""Charts are well-formed, put every point where its scale says, and never print labels over each other."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from glocal.report import Estimate, Forecast, ForecastPoint, TimeBar
from glocal.report.charts import drift, error_time, forecast, kept_map, svg, time_bars


def boxes(markup: str, klass: str) -> list[tuple[float, float, float, float]]:
    found = []
    for node in ET.fromstring(markup).iter("text"):
        if klass not in (node.get("class") or ""):
            continue
        width = svg.text_width(node.text or "")
        x, y = float(node.get("x", 0)), float(node.get("y", 0))
        start = x - {"start": 0, "middle": width / 2, "end": width}[node.get("text-anchor", "start")]
        found.append((start, y - 9, start + width, y + 2))
    return found


@pytest.mark.parametrize("size", [(704, 284), (358, 330)])
def test_error_time_labels_do_not_overlap(advice_page, size):
    markup = error_time.draw(advice_page.curve, *size)
    found = boxes(markup, "label")
    assert len(found) >= 5
    for index, (a1, b1, a2, b2) in enumerate(found):
        for c1, d1, c2, d2 in found[index + 1 :]:
            assert a2 <= c1 or c2 <= a1 or b2 <= d1 or d2 <= b1
    assert all(a >= 0 and c <= size[0] for a, _, c, _ in found)


def test_error_time_keeps_a_floor_far_below_at_the_edge(advice_page):
    low = error_time.draw(replace(advice_page.curve, floor=1e-7), 704, 284)
    assert "below this axis" in low and "below this axis" not in error_time.draw(advice_page.curve, 704, 284)


def test_error_time_survives_one_point_and_zero_error(advice_page):
    dense = next(point for point in advice_page.curve.points if point.kind == "dense")
    lonely = replace(advice_page.curve, points=(replace(dense, error=Estimate(0.0)),), band=(), floor=0.0, ceiling=None)
    ET.fromstring(error_time.draw(replace(lonely, limit=None), 358, 330))


def test_kept_map_draws_every_cell(advice_page):
    root = ET.fromstring(kept_map.draw(advice_page.kept, 426, 196))
    hints = [node.text or "" for node in root.iter("title")]
    assert len(hints) == 40 and sum("dense on purpose" in hint for hint in hints) == 8 + 2 * 4


def test_time_bars_are_to_scale(advice_page):
    markup = time_bars.draw(advice_page.times, 426, 196)
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="22"', markup)]
    dense, sparse = sum(widths[:2]) + 2, sum(widths[2:]) + 5  # each part leaves 1 px free
    assert sparse / dense == pytest.approx(9.8 / 15.1, rel=0.01)
    assert time_bars.part_names((TimeBar("a", (("rest", 1.0), ("attention", 2.0))),)) == ["attention", "rest"]


def test_forecast_draws_one_square_or_two(advice_page):
    both = forecast.draw(advice_page.forecast, 426, 196)
    assert both.count('class="frame"') == 2 and both.count('class="dot"') == 16
    only = forecast.draw(Forecast(time=(ForecastPoint("p", 1.0, 1.1),)), 426, 196)
    assert only.count('class="frame"') == 1


def test_pairs_are_ranked_worst_first(advice_page):
    root = ET.fromstring(drift.pairs(advice_page.pairs, 0.1, 620, 246))
    names = [node.text for node in root.iter("text") if (node.text or "").startswith("s0")]
    assert names[0] == "s07" and names[-1] == "s05"
    ET.fromstring(drift.ruler(Estimate(-0.01, -0.03, 0.01), None, 0.1, 310, 42))


def test_ticks_are_round_and_inside():
    assert svg.linear_ticks(0.0, 10.0, 5) in ([0, 2, 4, 6, 8, 10], [0, 2.5, 5, 7.5, 10])
    assert all(0.013 <= tick <= 0.9 for tick in svg.log_ticks(0.013, 0.9, 4))
    scale = svg.Scale(1.0, 100.0, 0.0, 200.0, log=True)
    assert scale(10.0) == pytest.approx(100.0) and scale.clip(1e6) == 200.0
