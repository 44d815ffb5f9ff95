"""Pages as one self-contained HTML text: style, script, pictures and data inside, no request to anywhere.

Templates, style sheet and script are package data in `templates/`; jinja2 is imported when a page is rendered.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from glocal.report import format as fmt
from glocal.report.charts import drift, error_time, forecast, kept_map, svg, time_bars
from glocal.report.pictures import data_uri
from glocal.report.records import AdvicePage, Column, Table

if TYPE_CHECKING:
    from jinja2 import Environment

_BADGES = {
    "validated": "VALIDATED n = {n}",
    "candidate": "CANDIDATE n = {n}",
    "demonstration": "DEMONSTRATION n = {n}",
    "dense": "STAY DENSE",
}


def environment() -> Environment:
    """The jinja2 environment of this room: escaping on, undefined names are errors."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("glocal.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        number=fmt.number,
        fixed=fmt.fixed,
        times=fmt.times,
        interval=fmt.interval,
        cell=fmt.cell,
        data_uri=data_uri,
    )
    made.globals["numeric"] = numeric
    for name in ("css", "js"):
        made.globals[name] = (files("glocal.report") / "templates" / f"page.{name}").read_text(encoding="utf-8")
    return made


def numeric(table: Table, column: int) -> bool:
    """Whether all present cells of a column are numbers (a column without any present cell is text)."""
    present = [row[column] for row in table.rows if row[column] is not None]
    return bool(present) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no "<" can close it."""
    return json.dumps(fmt.jsonable(value), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _pair_table(page: AdvicePage) -> Table:
    names = list(dict.fromkeys(name for pair in page.pairs for name in pair.measures))
    columns = [Column("sample"), Column("dense", "s"), Column("sparse", "s"), Column("speed-up", "×")]
    columns += [Column("drift"), Column("error"), Column("floor"), Column("ceiling"), *(Column(name) for name in names)]
    rows = []
    for pair in page.pairs:
        row = [pair.sample, pair.dense_time, pair.sparse_time, pair.dense_time / pair.sparse_time]
        row += [pair.drift, pair.error, pair.floor, pair.ceiling, *(pair.measures.get(name) for name in names)]
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows))


def _kernel_table(page: AdvicePage) -> Table:
    columns = (
        *(Column("kernel"), Column("what"), Column("median", "ms")),
        *(Column("5 %", "ms"), Column("95 %", "ms"), Column("calls")),
    )
    return Table(columns, tuple((k.name, k.what, k.median, k.low, k.high, k.n) for k in page.kernels))


def _rung_table(page: AdvicePage) -> Table:
    columns = (Column("recipe"), Column("kind"), Column("time", "s"), Column("speed-up", "×"), Column("error"))
    points = () if page.curve is None else sorted(page.curve.points, key=lambda point: point.time.value)
    dense = next((point.time.value for point in points if point.kind == "dense"), None)
    rows = [
        (
            p.label,
            error_time.KIND_NAMES[p.kind],
            p.time.value,
            None if dense is None else dense / p.time.value,
            p.error.value,
        )
        for p in points
    ]
    return Table(columns, tuple(rows))


def _legend(page: AdvicePage) -> str:
    if page.curve is None:
        return ""
    present = {point.kind for point in page.curve.points}
    parts = []
    for kind, name in error_time.KIND_NAMES.items():
        if kind in present:
            parts.append(svg.tag("span", svg.tag("svg", error_time.mark(kind, 9, 7), viewBox="0 0 18 14"), name))
    if page.curve.band:
        swatch = svg.rect(0, 2, 18, 10, "band") + svg.line(0, 7, 18, 7, "band-line")
        parts.append(svg.tag("span", svg.tag("svg", swatch, viewBox="0 0 18 14"), "predicted"))
    bars = [estimate for point in page.curve.points for estimate in (point.time, point.error)]
    levels = {estimate.level for estimate in bars if estimate.low is not None}
    if len(levels) == 1:
        parts.append(svg.tag("span", f"bars {100 * levels.pop():.0f} %, paired"))
    return "".join(parts)


def _strip_heading(role: str) -> str:
    words = role[:1].upper() + role[1:]
    return words if "pair" in role else f"{words} held-out sample"


def _charts(page: AdvicePage) -> dict[str, str]:
    def sized(draw: Callable[..., str], what: Any, wide: tuple[float, float], narrow: tuple[float, float]) -> str:
        return svg.both_sizes(lambda width, height: draw(what, width, height), wide, narrow)

    head, made = page.headline, {"legend": _legend(page)}
    # A dense verdict spends a line on its reason; shorter charts keep the first screen whole.
    less = 50 if head.status == "dense" else 0
    if head.drift is not None:
        estimate, worst, limit = head.drift, head.worst, head.limit
        made["ruler"] = svg.both_sizes(
            lambda width, height: drift.ruler(estimate, worst, limit, width, height), (310, 42), (236, 42)
        )
    if page.curve is not None:
        made["curve"] = sized(error_time.draw, page.curve, (704, 284 - less), (358, 330))
    if page.kept is not None:
        made["kept"] = sized(kept_map.draw, page.kept, (426, 196 - less), (358, 230))
    if page.times:
        made["times"] = sized(time_bars.draw, page.times, (426, 196 - less), (358, 214))
    if page.forecast is not None:
        made["forecast"] = sized(forecast.draw, page.forecast, (426, 196 - less), (358, 196))
    if page.pairs:
        size = 54 + 24 * len(page.pairs)
        made["pairs_chart"] = svg.both_sizes(
            lambda width, height: drift.pairs(page.pairs, head.limit, width, height), (620, size), (358, size)
        )
    return made


def render_advice(page: AdvicePage) -> str:
    """The advice page as HTML text."""
    from markupsafe import Markup

    strips = [
        {
            "role": strip.role,
            "heading": _strip_heading(strip.role),
            "sample": strip.sample,
            "caption": strip.caption,
            "frames": strip.frames,
            "width": strip.width,
            "height": strip.height,
            "fps": strip.fps,
            "labels": strip.labels,
        }
        for strip in page.strips
    ]
    recipe = "" if page.recipe_json is None else base64.b64encode(page.recipe_json.encode("utf-8")).decode("ascii")
    charts = {name: Markup(words) for name, words in _charts(page).items()}
    return (
        environment()
        .get_template("advice.html.j2")
        .render(
            page=page,
            badge=_BADGES[page.headline.status].format(n=page.headline.n),
            recipe_uri=f"data:application/json;base64,{recipe}",
            headings=[strip["heading"] for strip in strips],
            strips_json=script_json(strips),
            rows_json=script_json(page.rows),
            pair_table=_pair_table(page),
            kernel_table=_kernel_table(page),
            rung_table=_rung_table(page),
            **charts,
        )
    )
