"""Window rules from the command line: a pattern name and its options become one rule per axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from glocal._errors import nearest
from glocal.cli._common import extents

if TYPE_CHECKING:
    from glocal.patterns.axis import AxisWindow

PATTERNS = {
    "neighborhood": "a window around every query; --stride queries share one, --dilation spreads it",
    "window": "blocks of --window tokens that see themselves alone (stride = window)",
    "tile": "a window that moves by whole query tiles (stride = --stride, or the query tile)",
    "grid": "--window evenly spread tokens an axis (dilation = canvas / window)",
    "causal": "no later key on any axis; the whole past, or --window of it",
    "dense": "everybody sees everybody",
}
ALIASES = {"neighbourhood": "neighborhood"}


def pattern_name(text: str) -> str:
    """The name of PATTERNS that `text` spells. Raises ValueError with the closest."""
    name = ALIASES.get(text.lower(), text.lower())
    if name not in PATTERNS:
        close = nearest(name, [*PATTERNS, *ALIASES])
        raise ValueError(f"pattern {text!r} is unknown; legal: {', '.join(PATTERNS)}; nearest: {close}")
    return name


def window_rules(
    pattern: str,
    shape: tuple[int, ...],
    given: Mapping[str, str | None],
    q_tile: tuple[int, ...] | None,
) -> list[AxisWindow]:
    """The window rule of every axis that this pattern name stands for.

    given: texts of the options window, stride, dilation and causal, None where left out. Raises ValueError with the
    option, its value, what is legal and the nearest fix.
    """
    from glocal.patterns import Neighborhood
    from glocal.patterns.axis import AxisWindow
    from glocal.plan.checks import check_axes

    name = pattern_name(pattern)
    legal = {
        "neighborhood": ("window", "stride", "dilation", "causal"),
        "window": ("window",),
        "tile": ("window", "stride"),
        "grid": ("window",),
        "causal": ("window", "stride"),
        "dense": (),
    }[name]
    for option, text in given.items():
        if text is not None and option not in legal:
            raise ValueError(f"--{option} {text!r} says nothing to pattern {name!r}; use neighborhood, or leave it out")
    if given["window"] is None and name not in ("causal", "dense"):
        raise ValueError(f"pattern {name!r} needs --window, one number per axis of the canvas, such as {_half(shape)}")

    windows = shape if given["window"] is None else per_axis(given["window"], "--window", shape)
    ones = (1,) * len(shape)
    strides = ones if given["stride"] is None else per_axis(given["stride"], "--stride", shape)
    dilations = ones if given["dilation"] is None else per_axis(given["dilation"], "--dilation", shape)
    flags = _flags("all" if name == "causal" else given["causal"], len(shape))
    if name == "window":
        strides = windows
    elif name == "tile" and given["stride"] is None:
        if q_tile is None:
            raise ValueError("pattern 'tile' needs --q-tile (or --stride): the window moves by whole tiles")
        strides = q_tile
    elif name == "grid":
        for axis, (length, size) in enumerate(zip(shape, windows, strict=True)):
            if length % size:
                nearest = min((d for d in range(1, length + 1) if length % d == 0), key=lambda d: abs(d - size))
                raise ValueError(
                    f"--window {given['window']!r}: {size} does not divide axis {axis} of the canvas "
                    f"({length} tokens), as a grid must; nearest: {nearest}"
                )
        dilations = tuple(length // size for length, size in zip(shape, windows, strict=True))
    rules = [AxisWindow(k, s, d, c) for k, s, d, c in zip(windows, strides, dilations, flags, strict=True)]
    check_axes(shape, rules)
    Neighborhood(windows, strides, dilations, flags).axes(shape)  # refuses windows that fit only some dilation groups
    return rules


def per_axis(text: str, option: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers per axis; one number counts for all axes, `full` is the length of its axis."""
    parts = text.lower().split("x")
    extents("x".join("1" if part == "full" else part for part in parts), option)  # its words for what is no number
    if len(parts) == 1:
        parts = parts * len(shape)
    if len(parts) != len(shape):
        nearest = "x".join((["1"] * len(shape) + parts)[-len(shape) :])
        raise ValueError(
            f"{option} {text!r} has {len(parts)} axes, the canvas {'x'.join(map(str, shape))} has {len(shape)}; "
            f"legal: {len(shape)} numbers; nearest: {nearest}"
        )
    return extents("x".join(str(n) if p == "full" else p for p, n in zip(parts, shape, strict=True)), option)


def _flags(text: str | None, rank: int) -> tuple[bool, ...]:
    if text is None:
        return (False,) * rank
    if text == "all":
        return (True,) * rank
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < rank for part in parts):
        raise ValueError(
            f"--causal {text!r}; legal: 'all', or axis numbers 0 to {rank - 1} joined by commas; nearest: 0"
        )
    return tuple(str(axis) in parts for axis in range(rank))


def _half(shape: Sequence[int]) -> str:
    return "x".join(str(max(n // 2, 1)) for n in shape)
