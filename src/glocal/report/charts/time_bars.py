"""Where the time went: one stacked bar a run, all to one scale, and the parts as numbers below."""

from __future__ import annotations

from collections.abc import Sequence

from glocal.report.charts import svg
from glocal.report.charts.svg import Scale
from glocal.report.format import MISSING, number, seconds, time_unit
from glocal.report.records import TimeBar


def part_names(bars: Sequence[TimeBar]) -> list[str]:
    """Names of all parts in order of first appearance, "rest" last."""
    return sorted(dict.fromkeys(name for bar in bars for name, _ in bar.parts), key=lambda name: name == "rest")


def tone(name: str, names: Sequence[str]) -> str:
    """Class of a part: "rest" is always grey, the others take colours in order."""
    coloured = [other for other in names if other != "rest"]
    return "part-rest" if name == "rest" else f"part-{coloured.index(name) % 5}"


def draw(bars: Sequence[TimeBar], width: float, height: float) -> str:
    """The bars at the given width and about the given height in px. The first bar is the baseline."""
    names = part_names(bars)
    totals = [sum(value for _, value in bar.parts) for bar in bars]
    room = max(svg.text_width(seconds(total), 13) for total in totals) + 12
    scale = Scale(0.0, max(totals), 0.0, width - room)
    row, thick = 44.0, 22.0
    parts: list[str] = []
    for index, (bar, total) in enumerate(zip(bars, totals, strict=True)):
        y = index * row
        parts.append(svg.text(0, y + 12, bar.name, "label label-strong"))
        x = 0.0
        for name, value in bar.parts:
            length = scale(value)
            words = svg.title(f"{bar.name}: {name} {seconds(value)}, {value / total:.0%}")
            klass = tone(name, names)
            parts.append(svg.rect(x, y + 17, max(length - 1, 0.5), thick, klass, words))
            inside = f"{value / total:.0%}"
            if length > svg.text_width(inside, 12) + 10:
                parts.append(svg.text(x + length / 2, y + 17 + thick / 2 + 4, inside, f"{klass}-text", "middle"))
            x += length
        parts.append(svg.text(x + 6, y + 17 + thick / 2 + 4.5, seconds(total), "label label-strong"))
    top = len(bars) * row + 12
    pitch = min(19.0, max(15.0, (height - top) / (len(names) + 1)))
    parts += _numbers(bars, names, top, width, pitch)
    label = "; ".join(f"{bar.name} {seconds(total)}" for bar, total in zip(bars, totals, strict=True))
    return svg.document(width, top + pitch * len(names) + 12, parts, f"Where the time went: {label}", "chart")


def _numbers(bars: Sequence[TimeBar], names: list[str], top: float, width: float, pitch: float) -> list[str]:
    column = 92.0
    factor, unit = time_unit(max(value for bar in bars for _, value in bar.parts))
    parts = [
        svg.text(width - column * (len(bars) - 1 - i), top + 2, f"{bar.name}, {unit}", "tick", "end")
        for i, bar in enumerate(bars)
    ]
    parts.append(svg.line(0, top + 7, width, top + 7, "grid"))
    for row, name in enumerate(names):
        y = top + pitch * (row + 1) + 4
        parts.append(svg.rect(0, y - 9, 10, 10, tone(name, names)))
        parts.append(svg.text(16, y, svg.shorten(name, width - 16 - column * len(bars)), "label"))
        for index, bar in enumerate(bars):
            found = [value for part, value in bar.parts if part == name]
            words = number(sum(found) * factor) if found else MISSING
            parts.append(svg.text(width - column * (len(bars) - 1 - index), y, words, "label", "end"))
    return parts
