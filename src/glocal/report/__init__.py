"""Pages, tables and pictures from plain records. Knows no other room; loads jinja2 only when a page is rendered."""

from glocal.report.pictures import data_uri, matrix_png, png_bytes, sprite_sheet
from glocal.report.records import (
    AdvicePage,
    BandPoint,
    Baseline,
    Column,
    Curve,
    CurvePoint,
    Estimate,
    Forecast,
    ForecastPoint,
    Headline,
    KeptMap,
    KernelTime,
    Pair,
    Picture,
    Strip,
    Table,
    TimeBar,
)
from glocal.report.render import render_advice
from glocal.report.tables import TableReport, render_table, rows_of, table_csv, table_text

__all__ = [
    "AdvicePage",
    "BandPoint",
    "Baseline",
    "Column",
    "Curve",
    "CurvePoint",
    "Estimate",
    "Forecast",
    "ForecastPoint",
    "Headline",
    "KeptMap",
    "KernelTime",
    "Pair",
    "Picture",
    "Strip",
    "Table",
    "TableReport",
    "TimeBar",
    "data_uri",
    "matrix_png",
    "png_bytes",
    "render_advice",
    "render_table",
    "rows_of",
    "sprite_sheet",
    "table_csv",
    "table_text",
]
