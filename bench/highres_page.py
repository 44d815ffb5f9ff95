"""A page of results/highres.csv: a table of all methods and their pictures side by side, in one HTML file.

python bench/highres_page.py -o out/highres.html
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from highres import strip_name
from highres_verdicts import MEANT, NAMES, groups, judged, verdict

from glocal._files import write_atomic
from glocal.report import Column, Picture, Table, TableReport, render_table

ROOT = Path(__file__).resolve().parent.parent
MEASURES = ("right", "whole", "extra", "missing", "detail")
SIGNS = {"yes": "better", "no": "worse", "unclear": "unclear", "": None}
WIDE = ".pictures { grid-template-columns: 1fr } .pictures img { width: min(100%, 900px) }"


def table(rows: list[dict[str, str]]) -> Table:
    """One row a model, side and method, and whether it improves on "naive" in what the methods are for."""
    found: dict[tuple[str, int, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["model"], int(row["side"]), row["method"]), {})[row["measure"]] = row
    columns = [Column("model"), Column("side", "px"), Column("method"), Column("seeds")]
    columns += [
        Column("right", percent=True),
        Column("whole", percent=True),
        Column("extra"),
        Column("missing", percent=True),
    ]
    columns += [Column("detail"), Column("right, against naive"), Column("extra, against naive"), Column("verdict")]
    cells = []
    for (model, side, method), measures in found.items():
        values = [float(measures[m]["mean"]) if m in measures else None for m in MEASURES]
        better = [measures[m]["better"] for m in ("right", "extra")]
        seeds = int(measures["right"]["seeds"])
        said = None if method == "naive" else verdict(*better)
        cells.append((NAMES[model], side, method, seeds, *values, *(SIGNS[b] for b in better), said))
    return Table(tuple(columns), tuple(cells))


def verdicts(rows: list[dict[str, str]]) -> list[str]:
    """Which methods improve on naive sampling and which do not, a sentence for each model and side."""
    said = []
    for (model, side), methods in judged(rows).items():
        parts = [f"{word}: {', '.join(n.replace(',', '') for n in names)}" for word, names in groups(methods).items()]
        said.append(f"{NAMES[model]}, {side} px. {'; '.join(parts)}.")
    return said


def pictures(rows: list[dict[str, str]], folder: Path) -> list[Picture]:
    """The strips of the folder in the order of the table, the painted scenes before the methods of a side."""
    found = []
    for model, side in dict.fromkeys((row["model"], int(row["side"])) for row in rows):
        methods = dict.fromkeys(r["method"] for r in rows if (r["model"], int(r["side"])) == (model, side))
        for method in ("painted", *methods):
            png = folder / strip_name(model, side, method)
            if png.is_file():
                words = f"{NAMES[model]}, {side} x {side} px: {method}"
                found.append(Picture(words, png.read_bytes(), f"Pictures of the first captions: {method}"))
    return found


def page(rows: list[dict[str, str]], folder: Path) -> str:
    """The page as HTML."""
    captions = (folder / "captions.txt").read_text().splitlines()
    notes = (
        "The models were trained on pictures of 64 x 64 px. right: share of the objects named in a caption that stand "
        "exactly once in the picture, at the place named. whole: share of pictures where all do and nothing else is "
        "there. extra: objects too many, a picture. missing: share of the named objects. detail: what a picture loses "
        "when it is reduced to 64 px, over what the painted scene of its caption loses.",
        "Means over captions and noises (seeds) that are the same for every method. better or worse: the whole 90 % "
        "interval of the paired differences to naive sampling at the same side lies on that side of zero.",
        "Which methods improve on naive sampling. "
        + "; ".join(f"{word}: {meant}" for word, meant in MEANT.items())
        + ". A method without 'improves' does not show here what its paper claims. "
        + " ".join(verdicts(rows)),
        "Captions of the pictures, from left to right (rows of another run may have others; what they asked for stands "
        "in the painted strip of their side): " + " ".join(captions),
    )
    html = render_table(
        TableReport(
            title="Pictures larger than a model was trained for",
            table=table(rows),
            created="",
            subtitle="high-resolution methods on the built-in image models",
            notes=notes,
            pictures=tuple(pictures(rows, folder)),
            facts={"device": rows[0]["device"], "torch": rows[0]["torch"], "rows": "results/highres.csv"},
        )
    )
    # Sheets are wide: one below the other.
    return html.replace("</head>", f"<style>{WIDE}</style></head>", 1)


def main() -> None:
    """Read rows and pictures, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "results" / "highres.csv")
    parser.add_argument("--pictures", type=Path, default=ROOT / "results" / "highres")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "out" / "highres.html")
    options = parser.parse_args()
    with options.rows.open(newline="") as file:
        rows = list(csv.DictReader(file))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, page(rows, options.pictures))


if __name__ == "__main__":
    main()
