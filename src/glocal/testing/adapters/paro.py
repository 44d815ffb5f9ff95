"""PAROAttention (arXiv 2506.16054): the axis orders, and attention over a static mask in the order of each head."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from glocal.adapt.paro import blocks_of
from glocal.adapt.paro_plan import sequence
from glocal.canvas import Canvas, Layout
from glocal.ops import attend
from glocal.routing.selection import from_mask
from glocal.testing.adapter import Adapter, Run
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    config = case.config
    axes, words = (config["F"], config["H"], config["W"]), config["n_text_tokens"]
    if "in.q" not in case:
        text, media = torch.arange(words), words + torch.arange(prod(axes))
        orders = range(case["out.token_ids"].shape[0])
        return {"out.token_ids": torch.stack([sequence(axes, text, media, n) for n in orders]).int()}
    layout = Layout.of(Canvas(axes, before=words))
    part = blocks_of(layout.q, axes, case["in.order_index"].cpu(), config["block"])
    chosen = from_mask(layout, part.to(where.device), part.to(where.device), case["in.block_mask"][None])
    q, k, v = (case[f"in.{name}"] for name in "qkv")
    return {"out.o": attend(q, k, v, chosen, canvas=layout, backend=where.backend).out}


ADAPTER = Adapter("paro", run, attends=lambda case: "in.q" in case)
