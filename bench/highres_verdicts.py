"""What rows of results/highres.csv say of each method against naive sampling, in words; for pages and reports."""

from __future__ import annotations

from collections.abc import Sequence

Row = dict[str, str]
NAMES = {"unet": "UNet", "dit": "transformer"}
MEANT = {
    "improves": "more objects in place or fewer too many, and neither worse",
    "mixed": "one better, one worse",
    "no clear change": "both unclear",
    "worse": "one or both worse, none better",
}


def verdict(right: str, extra: str) -> str:
    """Of `MEANT`, from whether objects right and objects too many are "yes" better, "no" (worse) or "unclear"."""
    if "no" in (right, extra):
        return "mixed" if "yes" in (right, extra) else "worse"
    return "improves" if "yes" in (right, extra) else "no clear change"


def judged(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """(model, side) -> method -> measure -> row, without the trained side."""
    found: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["side"]), {}).setdefault(row["method"], {})[row["measure"]] = row
    return {key: methods for key, methods in found.items() if len(methods) > 1}


def groups(methods: dict[str, dict[str, Row]]) -> dict[str, list[str]]:
    """Verdict -> the methods that earn it, in the order of `MEANT`."""
    found: dict[str, list[str]] = {word: [] for word in MEANT}
    for name, measures in methods.items():
        if name != "naive":
            found[verdict(measures["right"]["better"], measures["extra"]["better"])].append(name)
    return {word: names for word, names in found.items() if names}


def figures(measures: dict[str, Row]) -> str:
    """Share of objects in place, and objects too many a picture."""
    return f"{float(measures['right']['mean']):.0%} in place, {float(measures['extra']['mean']):.1f} too many"


def lines(rows: Sequence[Row]) -> list[str]:
    """Markdown: for every model and side naive sampling, then the methods by verdict."""
    said = []
    for (model, side), methods in judged(rows).items():
        seeds, title = methods["naive"]["right"]["seeds"], NAMES[model][0].upper() + NAMES[model][1:]
        said += [f"**{title}, {side} px**, {seeds} captions; naive: {figures(methods['naive'])}.", ""]
        for word, names in groups(methods).items():
            each = "; ".join(f"`{name}` {figures(methods[name])}{_fewer(methods[name], seeds)}" for name in names)
            said.append(f"- {word} ({MEANT[word]}): {each}")
        said.append("")
    return said


def of_method(rows: Sequence[Row], start: str) -> list[str]:
    """Markdown: one line for each row of a method (names that begin with `start`) and side."""
    said = []
    for (model, side), methods in judged(rows).items():
        for name, measures in methods.items():
            if name.startswith(start):
                word = verdict(measures["right"]["better"], measures["extra"]["better"])
                base = figures(methods["naive"])
                said.append(f"- {NAMES[model]}, {side} px, `{name}`: **{word}**, {figures(measures)} (naive: {base})")
    return said


def _fewer(measures: dict[str, Row], seeds: str) -> str:
    mine = measures["right"]["seeds"]
    return "" if mine == seeds else f" ({mine} captions)"
