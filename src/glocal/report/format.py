"""Numbers as the pages print them: significant digits, intervals, units, shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glocal.report.records import Cell, Column, Estimate

MISSING = "–"
NARROW_SPACE = "\u202f"


def number(value: float | int | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits without exponents between 1e-4 and 1e6; a dash where it is None."""
    if value is None:
        return MISSING
    if isinstance(value, int):
        return grouped(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        mantissa, exponent = f"{value:.{max(digits - 1, 0)}e}".split("e")
        return f"{mantissa.replace('-', '−')}e{int(exponent)}".replace("e-", "e−")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:.{decimals}f}"
    whole, _, rest = text.lstrip("-").partition(".")
    text = grouped(int(whole)) + (f".{rest}" if rest else "")
    return ("−" if value < 0 else "") + text


def tick(value: float) -> str:
    """Number of an axis: up to three significant digits, no trailing zeros."""
    text = number(float(value))
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def grouped(value: int) -> str:
    """Integer with narrow spaces between thousands from five figures on."""
    text = f"{abs(value):,}".replace(",", NARROW_SPACE) if abs(value) >= 10_000 else str(abs(value))
    return ("−" if value < 0 else "") + text


def fixed(value: float | None, decimals: int = 2) -> str:
    """`value` with a fixed number of decimals; a dash where it is None."""
    if value is None:
        return MISSING
    return f"{value:.{decimals}f}".replace("-", "−")


def times(value: float | None, decimals: int = 2) -> str:
    """A speed-up: 1.54×."""
    return MISSING if value is None else f"{fixed(value, decimals)}×"


def percent(value: float | None, digits: int = 2) -> str:
    """A share as a percentage."""
    return MISSING if value is None else f"{number(100.0 * value, digits)}{NARROW_SPACE}%"


def interval(estimate: Estimate | None, decimals: int = 2) -> str:
    """Ends of an interval in brackets, empty where there are none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"[{fixed(estimate.low, decimals)}, {fixed(estimate.high, decimals)}]"


def time_unit(value: float) -> tuple[float, str]:
    """Factor from seconds, and name, of the unit that keeps a time of `value` seconds readable: µs, ms, s, min, h."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if abs(value) < limit:
            return factor, unit
    return 1 / 3600, "h"


def seconds(value: float | None, digits: int = 3) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return MISSING
    factor, unit = time_unit(value)
    return f"{number(value * factor, digits)}{NARROW_SPACE}{unit}"


def cell(value: Cell, column: Column) -> str:
    """Text of a table cell under its column."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if column.percent:
        return percent(value, column.digits)
    return number(value, column.digits)


def jsonable(value: Any) -> Any:
    """Plain JSON value; infinities and NaN, which JSON lacks, become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(
        f"{type(value).__name__} is no plain value; rows hold numbers, strings, booleans, lists and mappings"
    )
