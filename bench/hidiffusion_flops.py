"""What a step of SDXL computes with HiDiffusion, counted from shapes, into results/hidiffusion_flops.csv. Needs no GPU.

python bench/hidiffusion_flops.py

tflop: multiplications and additions of one sample in products of matrices, convolutions and attention. ratio: of the
dense step over it. run: the same of the whole run, in which each kind of step has its published number. A step can be
faster than its ratio only against a dense step that computes at a lower rate.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from generation.cases import CASES, Case
from generation.entries import Entry, Where
from generation.models import SDXL, made_on
from generation.rows import write
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from glocal.adapt import attach

CSV = Path(__file__).resolve().parent.parent / "results" / "hidiffusion_flops.csv"


def one_sample(case: Case) -> dict[str, Any]:
    """Inputs of a forward without memory, but for the timestep, which hosts read."""
    given = case.kind.inputs(case.grid, torch.device("cpu"), torch.float32)
    added = {name: value[:1].to("meta") for name, value in given["added_cond_kwargs"].items()}
    rest = {name: given[name][:1].to("meta") for name in ("sample", "encoder_hidden_states")}
    return {**rest, "timestep": given["timestep"], "added_cond_kwargs": added}


def flop(model: nn.Module, case: Case, entry: Entry | None) -> int:
    """Of one forward."""
    method = None if entry is None else entry.make(model, Where(case.kind, case.grid, 0, case.width))
    with nullcontext() if method is None else attach(model, method) as handle:
        if handle is not None:
            handle.state.total = case.steps
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**one_sample(case), return_dict=False)
    return int(counter.get_total_flops())


def rows(case: Case) -> list[dict[str, object]]:
    """The dense step, then each kind of step of the run."""
    with made_on(torch.device("meta"), torch.float32):
        model = case.kind.build(case.layers, case.width).eval()
    dense = flop(model, case, None)
    found = {entry: flop(model, case, entry) for entry in case.entries}
    run = sum(count * (case.steps if entry.steps is None else entry.steps) for entry, count in found.items())
    table: list[dict[str, object]] = [{"case": case.name, "step": "dense", "steps": case.steps, "tflop": _t(dense)}]
    for entry, count in found.items():
        more = {"tflop": _t(count), "ratio": f"{dense / count:.3f}", "run": f"{case.steps * dense / run:.3f}"}
        table.append({"case": case.name, "step": entry.name, "steps": entry.steps, **more, "paper": entry.paper})
    return table


def _t(count: int) -> str:
    return f"{count / 1e12:.3f}"


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    table = [row for case in CASES if case.kind is SDXL for row in rows(case)]
    for row in table:
        print(row, flush=True)
    write(table, args.out)


if __name__ == "__main__":
    main()
