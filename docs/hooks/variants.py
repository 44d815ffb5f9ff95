"""Puts the published variants of a system into its page: `<!-- variants: dinat -->`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

MARK = re.compile(r"<!-- variants: (\w+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for each page."""
    return MARK.sub(lambda found: variants_table(found[1]), markdown)


def variants_table(system: str) -> str:
    """One row a variant: parameters and multiply-adds of our model beside the published figures."""
    import torch

    from glocal.models import create_model, list_models, variant
    from glocal.models.flops import count_macs

    lines = [
        "| model | parameters | size | G multiply-adds, ours | published | published top-1 | |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name in list_models(system=system):
        found = variant(name)
        with torch.device("meta"):
            model = create_model(name)
        params = sum(parameter.numel() for parameter in model.parameters())
        macs = count_macs(model, found.size) / 1e9
        published = ["" if figure is None else f"{figure:g}" for figure in (found.gflops, found.top1)]
        note = "; ".join(part for part in (found.pretrained_on and f"after {found.pretrained_on}", found.note) if part)
        cells = (f"`{name}`", f"{params:,}", str(found.size), f"{macs:.2f}", *published, note)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
