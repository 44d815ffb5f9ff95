"""Puts measured figures into pages, from the tables of results/: of a vision system, `<!-- figures: davit -->`; what
rows of large pictures say against naive sampling, of one method or of all, `<!-- verdicts: hidiffusion -->`.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

from tables import measured

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import highres_verdicts  # noqa: E402

VERDICTS = re.compile(r"<!-- verdicts: (\w+) -->")
MARK = re.compile(r"<!-- figures: (\w+) -->")
MODELS = {"hilo": "litv2", "sg_former": "sgformer"}  # how names of models start, where not as their system's
RUN = "`python bench/{}.py --device {}` makes them"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for each page."""
    markdown = VERDICTS.sub(lambda found: verdicts(found[1]), markdown)
    return MARK.sub(lambda found: figures(found[1]), markdown)


def verdicts(method: str) -> str:
    """Of one method, or of all."""
    rows = read("highres")
    said = highres_verdicts.lines(rows) if method == "all" else highres_verdicts.of_method(rows, method)
    return (
        "\n".join(said)
        if said
        else "No rows of large pictures were measured yet; `python bench/highres.py` makes them."
    )


def figures(system: str) -> str:
    """Throughput beside timm, the paper's claims of cost, and the row of the mixer table; what is missing is said."""
    start = MODELS.get(system, system)
    parts = []
    rows = [row for row in read("vision_throughput") if row["model"].startswith(start)]
    head = ("model", "beside (timm)", "mode", "pass", "images/s", "timm", "ratio", "90 % interval", "device")
    cells = [
        (r["model"], r["beside"], r["mode"], r["pass"], r["images_s"], r["timm_images_s"], r["ratio"],
         f"{r['ratio_low']} to {r['ratio_high']}", r["device"])
        for r in rows
    ]  # fmt: skip
    missing = f"No throughput was measured yet; {RUN.format('vision_throughput', 'cuda')}."
    parts.append(measured(head, cells) if cells else missing)
    rows = [row for row in read("vision_claims") if row["claim"] == system]
    head = ("claim", "against", "size", "ours", "theirs", "unit", "ratio", "paper", "device")
    cells = [
        (r["subject"], r["rival"], r["size"], r["ours"], r["theirs"], r["unit"], r["ratio"], r["paper"], r["device"])
        for r in rows
    ]
    if cells:
        parts.append(measured(head, cells))
    rows = [row for row in read("mixers") if row["mixer"] == system and not row["reason"]]
    head = ("task", "score", "mean of seeds", "spread", "parameters", "M MACs", "updates", "seeds", "device")
    cells = [
        (f"{r['task']}, {r['size']} px", r["score"], r["mean"], r["spread"], r["params"], r["mmacs"], r["steps"],
         r["seeds"], r["device"])
        for r in rows
    ]  # fmt: skip
    if cells:
        parts.append("As a token mixer in the equal small backbone of [`glocal compare --train`](../compare.md):")
        parts.append(measured(head, cells))
    return "\n\n".join(parts)


def read(name: str) -> list[dict[str, str]]:
    """Rows of results/name.csv, none where the file is not there."""
    path = ROOT / "results" / f"{name}.csv"
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []
