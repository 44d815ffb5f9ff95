"""Forecast against measured, one square a quantity; points on the diagonal were foretold exactly."""

from __future__ import annotations

from collections.abc import Sequence

from glocal.report.charts import svg
from glocal.report.charts.svg import Scale
from glocal.report.format import number, tick
from glocal.report.records import Forecast, ForecastPoint


def _square(
    points: Sequence[ForecastPoint], name: str, left: float, top: float, side: float, band: float | None
) -> list[str]:
    values = [value for point in points for value in (point.predicted, point.measured)]
    low, high = min(values) / 1.25, max(values) * 1.25
    x = Scale(low, high, left, left + side, log=True)
    y = Scale(low, high, top + side, top, log=True)
    parts = [svg.rect(left, top, side, side, "frame")]
    if band is not None and band > 1:
        corners = [(low, min(low * band, high)), (high / band, high), (high, high), (high, high / band)]
        corners += [(min(low * band, high), low), (low, low)]
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in corners)
        parts.append(svg.tag("polygon", points=path, klass="band"))
    parts.append(svg.line(x(low), y(low), x(high), y(high), "diagonal"))
    ticks = x.ticks(3)
    if len(ticks) > 4:
        ticks = ticks[:: (len(ticks) + 3) // 4]
    free = left - side  # where the last number below the square ends
    for value in ticks:
        parts.append(svg.text(left - 5, y(value) + 4, tick(value), "tick", "end"))
        half = svg.text_width(tick(value)) / 2
        if x(value) - half > free + 4:
            parts.append(svg.text(x(value), top + side + 14, tick(value), "tick", "middle"))
            free = x(value) + half
    for point in points:
        words = svg.title(f"{point.label}: forecast {number(point.predicted)}, measured {number(point.measured)}")
        parts.append(svg.tag("circle", words, cx=x(point.predicted), cy=y(point.measured), r=3.6, klass="dot"))
    parts.append(svg.text(left, top - 8, name, "label label-strong"))
    return parts


def draw(forecast: Forecast, width: float, height: float) -> str:
    """The squares side by side at the given size in px."""
    pad, top, bottom = 40.0, 24.0, 36.0
    both = bool(forecast.time) and bool(forecast.error)
    side = min(height - top - bottom, width / 2 - pad - 14 if both else width - pad - 12)
    parts: list[str] = []
    left = pad
    spread = "" if forecast.time_spread is None else f" ±{100 * forecast.time_spread:.0f} %"
    factor = "" if forecast.error_factor is None else f" ×{forecast.error_factor:.1f}"
    for points, name, band in (
        (forecast.time, f"time, s{spread}", None if forecast.time_spread is None else 1 + forecast.time_spread),
        (forecast.error, f"error{factor}", forecast.error_factor),
    ):
        if points:
            parts += _square(points, name, left, top, side, band)
            left = width / 2 + pad + 6
    if forecast.time or forecast.error:
        parts.append(svg.text(pad, height - 4, "forecast across, measured up", "axis-name"))
    total = len(forecast.time) + len(forecast.error)
    return svg.document(width, height, parts, f"Forecast against measured, {total} points", "chart")
