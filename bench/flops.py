"""Multiply-adds of every published backbone beside the published figure, counted from shapes, into results/flops.csv.

python bench/flops.py
python bench/flops.py --only davit_tiny --out /dev/stdout
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import torch

from glocal._files import write_atomic
from glocal.models import create_model, list_models
from glocal.models.flops import count_macs
from glocal.models.registry import variant

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "flops.csv"
FIELDS = ("model", "system", "size", "params", "published_params", "gmacs", "published_gmacs", "off_percent", "note")


def row(name: str) -> dict[str, object]:
    """One model, built without memory for its weights."""
    known = variant(name)
    with torch.device("meta"):
        model = create_model(name)
    params = sum(p.numel() for p in model.parameters())
    gmacs = count_macs(model, known.size) / 1e9
    off = "" if known.gflops is None else f"{100 * (gmacs / known.gflops - 1):.1f}"
    published = "" if known.gflops is None else known.gflops
    size = {"model": name, "system": known.system, "size": known.size, "params": params}
    counted = "" if known.params is None else known.params
    figures = {"published_params": counted, "gmacs": f"{gmacs:.3f}", "published_gmacs": published}
    return {**size, **figures, "off_percent": off, "note": known.note}


def main() -> None:
    """Read the arguments and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only")
    p.add_argument("--out", type=Path, default=CSV)
    a = p.parse_args()
    names = [n for n in list_models() if variant(n).system] if a.only is None else a.only.split(",")
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for name in names:
        found = row(name)
        writer.writerow(found)
        print(*(found[k] for k in ("model", "gmacs", "published_gmacs", "off_percent")), flush=True)
    write_atomic(a.out, text.getvalue().encode())


if __name__ == "__main__":
    main()
