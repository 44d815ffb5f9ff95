"""Error against time, end to end: every rung of the ladder with its bars, the predicted band, floor, limit and ceiling.

Both axes are honest about scale: time starts where the fastest rung is and a second axis on top gives the speed-up; the
error axis is logarithmic, because floor and ceiling lie orders apart, and says so.
"""

from __future__ import annotations

import math

from glocal.report.charts import svg
from glocal.report.charts.svg import Labeller, Scale
from glocal.report.format import number, tick, times
from glocal.report.records import Curve, CurvePoint, Estimate

KIND_NAMES = {
    "chosen": "chosen",
    "allocation": "allocation",
    "relative": "allocation by relative error",
    "single": "single method",
    "published": "published default",
    "dense": "dense",
}


def mark(kind: str, x: float, y: float, *children: str) -> str:
    """The mark of one kind of point, centred on (x, y)."""
    klass = f"mark mark-{kind}"
    if kind == "chosen":
        return svg.tag("circle", *children, cx=x, cy=y, r=6.5, klass=klass)
    if kind in ("allocation", "relative"):
        return svg.tag("circle", *children, cx=x, cy=y, r=4.5, klass=klass)
    if kind == "dense":
        return svg.rect(x - 5, y - 5, 10, 10, klass, *children)
    arm = 4.5
    if kind == "single":
        path = f"M{x - arm:.1f} {y - arm:.1f}l{2 * arm} {2 * arm}m0 {-2 * arm}l{-2 * arm} {2 * arm}"
    else:
        path = f"M{x - arm - 1:.1f} {y:.1f}h{2 * arm + 2}M{x:.1f} {y - arm - 1:.1f}v{2 * arm + 2}"
    return svg.tag("path", *children, d=path, klass=klass)


def _ends(estimate: Estimate) -> tuple[float, float]:
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    return low, high


def _scales(curve: Curve, box: tuple[float, float, float, float]) -> tuple[Scale, Scale]:
    left, top, right, bottom = box
    moments = [end for point in curve.points for end in _ends(point.time)] + [point.time for point in curve.band]
    errors = [end for point in curve.points if point.kind != "dense" for end in _ends(point.error)]
    errors += [end for point in curve.band for end in (point.low, point.high)]
    errors += [value for value in (curve.limit, curve.ceiling) if value is not None]
    positive = [value for value in errors if value > 0]
    low, high = (min(positive), max(positive)) if positive else (0.01, 1.0)
    # A floor far below every rung is marked at the edge instead of squeezing all rungs into the top of the chart.
    if curve.floor is not None and curve.floor > low / 30:
        low = min(low, curve.floor)
    span = max(max(moments) - min(moments), 0.05 * max(moments))
    x = Scale(max(0.0, min(moments) - 0.16 * span), max(moments) + 0.10 * span, left, right)
    y = Scale(low / 1.45, high * 1.75, bottom, top, log=True)
    return x, y


def _point(point: CurvePoint, x: Scale, y: Scale) -> list[str]:
    px, py = x(point.time.value), y.clip(point.error.value)
    parts = []
    for horizontal, (low, high) in ((True, _ends(point.time)), (False, _ends(point.error))):
        if low < high:
            ends = (x(low), py, x(high), py) if horizontal else (px, y.clip(low), px, y.clip(high))
            parts.append(svg.line(*ends, klass=f"bar bar-{point.kind}"))
    count = "" if point.n is None else f", n = {point.n}"
    words = (
        f"{point.label} ({KIND_NAMES[point.kind]}{count}): {number(point.time.value)} s, "
        f"error {number(point.error.value)}"
    )
    parts.append(mark(point.kind, px, py, svg.title(words)))
    return parts


def _reference_lines(curve: Curve, x: Scale, y: Scale, labels: Labeller) -> list[str]:
    parts = []
    for name, value, klass in (
        (f"ceiling: {curve.ceiling_name}", curve.ceiling, "ceiling"),
        ("limit", curve.limit, "limit"),
        ("floor: another exact kernel", curve.floor, "floor"),
    ):
        if value is None:
            continue
        outside = value < y.low
        py = y.start - 1 if outside else y(value)
        words = f"{name}, {number(value, 2)}" + (" (below this axis)" if outside else "")
        width = svg.text_width(words, 11) + 4
        # The limit is named on the right: few rungs are both slow and wrong. The others keep to the left.
        at_right = klass == "limit"
        start = x.stop - width if at_right else x.start
        parts.append(svg.line(x.start, py, x.stop, py, f"ref ref-{klass}"))
        anchor = "end" if at_right else "start"
        parts.append(
            svg.text(x.stop - 2 if at_right else x.start + 4, py - 5, words, f"ref-label ref-label-{klass}", anchor)
        )
        labels.block_box(start, py - 16, start + width, py - 2)
        labels.block_box(x.start, py - 1, x.stop, py + 1)
    return parts


def _axes(curve: Curve, x: Scale, y: Scale, height: float) -> list[str]:
    parts = []
    for value in y.ticks(4):
        parts.append(svg.line(x.start, y(value), x.stop, y(value), "grid"))
        parts.append(svg.text(x.start - 7, y(value) + 4, tick(value), "tick", "end"))
    for value in x.ticks(6 if x.stop - x.start > 400 else 4):
        parts.append(svg.line(x(value), y.start, x(value), y.start + 4, "axis"))
        parts.append(svg.text(x(value), y.start + 17, tick(value), "tick", "middle"))
    parts.append(svg.line(x.start, y.start, x.stop, y.start, "axis"))
    parts.append(svg.text(x.stop, height - 5, "seconds a sample, end to end", "axis-name", "end"))
    dense = next((point.time.value for point in curve.points if point.kind == "dense"), None)
    if dense is not None:
        last = -math.inf
        for ratio in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0):
            moment = dense / ratio
            if not x.low <= moment <= x.high or (last != -math.inf and last - x(moment) < 46):
                continue
            last = x(moment)
            parts.append(svg.line(last, y.stop - 4, last, y.stop, "axis"))
            parts.append(svg.text(last, y.stop - 8, times(ratio, 2 if ratio == 1.75 else 1), "tick", "middle"))
    return parts


def draw(curve: Curve, width: float, height: float) -> str:
    """The chart at the given size in px."""
    left, top, right, bottom = 46.0, 22.0, width - 14.0, height - 42.0
    x, y = _scales(curve, (left, top, right, bottom))
    labels = Labeller(left + 2, top, right + 12, bottom)
    parts = _axes(curve, x, y, height)
    band = [point for point in sorted(curve.band, key=lambda point: point.time) if x.low <= point.time <= x.high]
    if len(band) >= 2:
        upper = [f"{x(point.time):.1f},{y.clip(point.high):.1f}" for point in band]
        lower = [f"{x(point.time):.1f},{y.clip(point.low):.1f}" for point in reversed(band)]
        parts.append(svg.tag("polygon", points=" ".join(upper + lower), klass="band"))
        middle = " ".join(f"{x(point.time):.1f},{y.clip(point.middle):.1f}" for point in band)
        parts.append(svg.tag("polyline", points=middle, klass="band-line"))
    parts += _reference_lines(curve, x, y, labels)
    order = {"chosen": 0, "dense": 1, "allocation": 2, "relative": 3, "single": 4, "published": 5}
    ranked = sorted(curve.points, key=lambda point: order[point.kind])
    for point in ranked:
        px, py = x(point.time.value), y.clip(point.error.value)
        labels.block(px, py, 6)
        (fast, slow), (low, high) = _ends(point.time), _ends(point.error)
        labels.block_box(x(fast), py - 2, x(slow), py + 2)
        labels.block_box(px - 2, y.clip(high), px + 2, y.clip(low))
    for point in reversed(ranked):
        parts += _point(point, x, y)
    waiting = []
    for point in ranked:
        words = svg.shorten(point.label, 200)
        klass = "label label-strong" if point.kind == "chosen" else "label"
        px = x(point.time.value)
        reach = max(x(_ends(point.time)[1]) - px, px - x(_ends(point.time)[0]), 6.0) + 4
        placed = labels.place(px, y.clip(point.error.value), words, klass, reach)
        if placed:
            parts.append(placed)
        else:
            waiting.append((px, y.clip(point.error.value), words, klass))
    parts += [labels.place_far(*label) for label in waiting]
    summary = f"Error against time of {len(curve.points)} recipes; all values stand in the ladder table below."
    return svg.document(width, height, parts, summary, "chart")
