"""Drift of the validation pairs: the ruler of the headline, and one row a pair."""

from __future__ import annotations

from collections.abc import Sequence

from glocal.report.charts import svg
from glocal.report.charts.svg import Scale
from glocal.report.format import fixed
from glocal.report.records import Estimate, Pair


def ruler(drift: Estimate, worst: float | None, limit: float, width: float, height: float) -> str:
    """Mean, interval and worst on one line from no drift to beyond twice the limit."""
    ends = [value for value in (drift.value, drift.low, drift.high, worst) if value is not None]
    low = min(0.0, *ends)
    high = max(2.3 * limit, 1.08 * max(ends))
    x = Scale(low - 0.02 * (high - low), high, 4, width - 4)
    y = 16.0
    parts = [svg.line(x.start, y, x.stop, y, "axis")]
    near = x(limit) - x(0) < 60  # long drifts push the marks together: the last name goes, the other moves aside
    for value, words in ((0.0, "0 = kernel change"), *_limits(x, limit)):
        anchor = "start" if (value == 0 and low == 0) or (value and near) else "middle"
        parts.append(svg.line(x(value), y - 7, x(value), y + 7, "ref ref-limit" if value else "axis"))
        if value == 0 and x(limit) - x(0) < 130:
            words = "0"
        parts.append(svg.text(x(value), y + 22, words, "tick", anchor))
    if drift.low is not None and drift.high is not None:
        parts.append(svg.rect(x(drift.low), y - 4, max(x(drift.high) - x(drift.low), 2), 8, "interval"))
    if worst is not None:
        parts.append(
            svg.tag("path", svg.title(f"worst {fixed(worst)}"), d=f"M{x(worst):.1f} {y - 8}v16", klass="worst")
        )
    parts.append(
        svg.tag("circle", svg.title(f"mean {fixed(drift.value)}"), cx=x(drift.value), cy=y, r=5.0, klass="dot")
    )
    return svg.document(
        width, height, parts, f"drift {fixed(drift.value)} against the limit {fixed(limit)}", "chart ruler"
    )


def _limits(x: Scale, limit: float) -> list[tuple[float, str]]:
    """Where the limits of the mean and of the worst stand, and their names; the second has none without room for it."""
    first, second = f"limit {fixed(limit)}", "2 × limit"
    room = x(2 * limit) - x(limit) > (svg.text_width(first) + svg.text_width(second)) / 2 + 6
    return [(limit, first), (2 * limit, second if room else "")]


def pairs(rows: Sequence[Pair], limit: float, width: float, height: float) -> str:
    """One row a pair, largest drift on top, with the limit of the mean and of the worst."""
    ranked = sorted(rows, key=lambda pair: -pair.drift)
    longest = max(svg.text_width(pair.sample) for pair in ranked)
    left, top, right, bottom = min(longest + 14, 0.3 * width), 20.0, width - 44.0, height - 34.0
    low = min(0.0, ranked[-1].drift)
    x = Scale(low, max(2.1 * limit, 1.05 * ranked[0].drift), left, right)
    pitch = (bottom - top) / len(ranked)
    parts = []
    for value, words in _limits(x, limit):
        parts.append(svg.line(x(value), top - 2, x(value), bottom, "ref ref-limit"))
        parts.append(svg.text(x(value), top - 7, words, "tick", "middle"))
    for value in x.ticks(4):
        parts.append(svg.text(x(value), bottom + 15, fixed(value), "tick", "middle"))
    parts.append(svg.line(left, bottom, right, bottom, "axis"))
    for index, pair in enumerate(ranked):
        y = top + (index + 0.5) * pitch
        parts.append(svg.text(left - 8, y + 4, svg.shorten(pair.sample, left - 8), "tick", "end"))
        parts.append(svg.line(x(min(max(0.0, low), pair.drift)), y, x(pair.drift), y, "stem"))
        parts.append(svg.tag("circle", cx=x(pair.drift), cy=y, r=4.0, klass="dot"))
        parts.append(svg.text(x(pair.drift) + 9, y + 4, fixed(pair.drift), "label"))
    parts.append(svg.text(right, height - 3, "drift: 0 = kernel change, 1 = the ceiling", "axis-name", "end"))
    return svg.document(width, height, parts, f"Drift of {len(ranked)} pairs, worst {fixed(ranked[0].drift)}", "chart")
