"""Named points with vertical bars as one self-contained SVG: a score over a cost on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glocal.report.charts.svg import linear_ticks, log_ticks, tag

_STYLE = (
    "text{font:12px sans-serif;fill:#222}.axis{stroke:#888}.grid{stroke:#ddd}.bar{stroke:#2563a8}.dot{fill:#2563a8}"
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 110, 16, 44


@dataclass(frozen=True)
class Dot:
    """One point: x positive, y with `spread` above and below (NaN: no bar)."""

    name: str
    x: float
    y: float
    spread: float = float("nan")


def scatter(dots: Sequence[Dot], x_label: str, y_label: str, width: int = 640, height: int = 400) -> str:
    """The picture. Raises ValueError for no points, or an x that is not positive."""
    if not dots:
        raise ValueError("scatter: no points to draw.")
    if min(dot.x for dot in dots) <= 0:
        raise ValueError(f"scatter: x must be positive on a logarithmic axis; it starts at {min(d.x for d in dots)}.")
    bars = [0.0 if math.isnan(dot.spread) else dot.spread for dot in dots]
    low = min(dot.y - bar for dot, bar in zip(dots, bars, strict=True))
    high = max(dot.y + bar for dot, bar in zip(dots, bars, strict=True))
    room = 0.06 * (high - low) if high > low else 0.05
    low, high = low - room, high + room
    first, last = min(dot.x for dot in dots) / 1.15, max(dot.x for dot in dots) * 1.15

    def across(x: float) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * math.log(x / first) / math.log(last / first)

    def up(y: float) -> float:
        return height - _BOTTOM - (height - _TOP - _BOTTOM) * (y - low) / (high - low)

    parts = [tag("style", _STYLE), tag("rect", width=width, height=height, fill="#fff")]
    for y in linear_ticks(low, high, 6):
        parts += [_line(_LEFT, up(y), width - _RIGHT, up(y), "grid"), _text(_LEFT - 6, up(y) + 4, f"{y:.3g}", "end")]
    for x in log_ticks(first, last, 6):
        parts += [_line(across(x), _TOP, across(x), height - _BOTTOM, "grid")]
        parts += [_text(across(x), height - _BOTTOM + 16, f"{x:,.0f}", "middle")]
    parts += [_line(_LEFT, height - _BOTTOM, width - _RIGHT, height - _BOTTOM, "axis")]
    parts += [_text((_LEFT + width - _RIGHT) / 2, height - 8, x_label, "middle"), _text(8, 12, y_label, "start")]
    for dot, bar in zip(dots, bars, strict=True):
        parts.append(_line(across(dot.x), up(dot.y - bar), across(dot.x), up(dot.y + bar), "bar"))
        parts.append(tag("circle", cx=_n(across(dot.x)), cy=_n(up(dot.y)), r=4, **{"class": "dot"}))
        parts.append(_text(across(dot.x) + 7, up(dot.y) + 4, dot.name, "start"))
    box = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", **box)


def _n(value: float) -> str:
    return f"{value:.1f}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return tag("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), **{"class": kind})


def _text(x: float, y: float, words: str, anchor: str) -> str:
    safe = words.replace("&", "&amp;").replace("<", "&lt;")
    return tag("text", safe, x=_n(x), y=_n(y), **{"text-anchor": anchor})
